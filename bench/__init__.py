"""The benchmarks behind every performance claim: ``make bench`` prints ratios measured side by side in one run."""

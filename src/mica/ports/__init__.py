"""What the engine needs from outside, as small Protocols. Adapters implement them; fakes in ``mica.testing`` too."""

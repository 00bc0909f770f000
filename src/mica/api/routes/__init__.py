"""Routes, one file per noun. A handler parses, calls the engine, and answers; decisions live elsewhere."""

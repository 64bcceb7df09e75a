"""Reports: HTML pages, pictures, and output for a terminal."""

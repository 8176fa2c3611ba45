"""Video files and arrays: reading, writing, layouts, timestamps, image pyramids."""

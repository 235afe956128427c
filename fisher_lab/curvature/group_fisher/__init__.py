"""Parts of group Fisher: running moments, and how parameters fall into groups."""

"""Pages for people: one HTML file each, which loads nothing."""

"""Side-by-side measurement of methods: plain in-process federations, their figures, tables and pictures."""

"""Block-sparse relative-position attention across chunk boundaries."""

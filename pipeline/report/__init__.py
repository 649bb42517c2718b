"""The report of a run: one HTML page that stands alone, of sections with facts, tables, curves and pictures."""

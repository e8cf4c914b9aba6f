"""Everything that is shown: records, tables, pages, figures and comparisons."""

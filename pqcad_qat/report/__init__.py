"""Everything shown to a user: records, tables, pages, figures and comparisons."""

"""The zoo inside other libraries."""

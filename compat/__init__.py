"""The only place that knows versions of torch and of the host libraries."""

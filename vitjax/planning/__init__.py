"""Plans a run for devices that need not be there: `vitjax plan`."""

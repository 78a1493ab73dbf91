"""Models: modules that only define layers, used functionally through `functional.Model`."""

"""One file a data set: each reads the files as they are published into a `Cohort`."""

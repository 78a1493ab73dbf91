"""Starts trainings: here in several processes, or on SLURM, Kubernetes, TPU VMs, SkyPilot.

It fills in the templates of launch/, hands them to the scheduler's own client, and reads back the
state. It trains nothing, and imports no JAX.
"""

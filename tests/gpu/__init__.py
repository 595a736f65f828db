"""Tier: gpu. What only a device can show; scripts/gpu_check.py runs it with everything else."""

"""Measurements that are the project's commands."""

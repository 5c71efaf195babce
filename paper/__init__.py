"""The paper's claims, tasks and tables."""

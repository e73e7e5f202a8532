"""metier on Kubernetes: one Helm chart, and training runs rendered from Python."""

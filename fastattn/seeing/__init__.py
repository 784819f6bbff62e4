"""What a model attends to, while it runs fused: weights, statistics, rollout. Nothing is n x n unless it says so."""

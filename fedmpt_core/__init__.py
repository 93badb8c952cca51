"""FedMPT without any federated framework: model, data, training, evaluation."""

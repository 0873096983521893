"""The same network and training step in PyTorch, eager, with its fused optimizers."""

import torch
from torch import nn
from torch.nn import functional


def half(n_in, n_hidden, n_out, activations, keep_prob):
    """Returns the encoder or the decoder: two hidden layers with dropout, and a linear one."""
    first, second = activations
    dropout = 1 - keep_prob
    layers = [nn.Linear(n_in, n_hidden), first, nn.Dropout(dropout)]
    layers += [nn.Linear(n_hidden, n_hidden), second, nn.Dropout(dropout), nn.Linear(n_hidden, n_out)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def train(images, n_epochs, report, optimizer, dim_z, n_hidden=500, batch_size=128, keep_prob=0.9):
    """Trains on images (n, 784) uint8 and reports the loss of every epoch, nats per image."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    torch.manual_seed(0)
    encoder = half(784, n_hidden, 2 * dim_z, (nn.ELU(), nn.Tanh()), keep_prob)
    decoder = half(dim_z, n_hidden, 784, (nn.Tanh(), nn.ELU()), keep_prob)
    weights = [*encoder.parameters(), *decoder.parameters()]
    if optimizer == "adam":
        update = torch.optim.Adam(weights, lr=1e-3, fused=True)
    else:
        update = torch.optim.SGD(weights, lr=1e-3, momentum=0.98, nesterov=True, fused=True)
    images = torch.tensor(images)
    n_steps = len(images) // batch_size
    for _ in range(n_epochs):
        batches = torch.randperm(len(images))[: n_steps * batch_size].reshape(n_steps, batch_size)
        total = 0.0
        for batch in batches:
            x = images[batch].float() / 255
            mean, log_var = encoder(x).chunk(2, dim=1)
            z = mean + torch.exp(log_var / 2) * torch.randn_like(mean)
            logits = decoder(z)
            reconstruction = functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
            loss = (reconstruction + kl) / batch_size
            update.zero_grad()
            loss.backward()
            if optimizer == "sgd":
                nn.utils.clip_grad_norm_(weights, 20.0)
            update.step()
            total += loss.item()
        report(total / n_steps)

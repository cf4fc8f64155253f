"""torchrun --nproc-per-node=2 examples/train_alexnet.py"""

import torch
import torchvision

import torch_soap

torch.manual_seed(0)
model = torch_soap.parallelize(torchvision.models.alexnet(num_classes=10))  # the one line
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for step in range(5):
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(10, (8,))  # this process' rows
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")

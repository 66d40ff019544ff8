"""FedLGD: clients learn from virtual images of their own and of the server's, which are distilled while they train."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn  # noqa: F401  for the example

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import DataError
from limbeck.core.reduction import check_inside, check_positive
from limbeck.schemes.federated.clients import Where
from limbeck.schemes.federated.distilling import Pull, Start, Virtual, VirtualWork, noise
from limbeck.schemes.federated.fedavg import averaged
from limbeck.schemes.federated.local import Round, check_lengths, seeded
from limbeck.schemes.federated.owners import Owners, of_labels, split_among
from limbeck.schemes.federated.rounds import Federation, Plan, training_of
from limbeck.schemes.federated.virtual import KINDS, check_kinds, gradient_loss
from limbeck.schemes.federated.wire import Tensors, below, under
from limbeck.schemes.parts.looking import whole_batches
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_SERVER = 1 << 20  # of the server's own draws, beside the clients' numbers


@register(
    Card(
        key="fedlgd",
        name="FedLGD",
        title="Federated Learning on Virtual Heterogeneous Data with Local-global Distillation",
        year=2024,
        arxiv="2303.02278",
        code="ubc-tea/FedLGD",
        knowledge="scheme",
        equation=r"S_k: \min \sum_c \| \bar e_c(R) - \bar e_c(S_k) \|^2, \quad S_g: \min \sum (1 - \cos(g^R, g^S)), "
        r"\quad \theta_k: L(S_k \cup S_g) + \lambda L_{con}",
        use="Where clients' images differ in kind as well as in classes, and are many: each trains on a few distilled "
        "ones, anchored by the server's. A digest of the images is what is learned from; the images are not.",
        defaults={
            "images": "50 of a class at a client and 10 at the server, the code's",
            "warm_up": "10000 steps, the code's; hundreds do for small images",
            "weight": "1, the code's; 10 in its runs on digits",
            "temperature": "0.07, the code's",
            "every": "images are made anew every 5 rounds, 10 times, as in the code",
        },
        evidence="formula",
        evidence_note="both matching losses and the averaged step against their definitions",
        choices=(
            "a client has virtual images of the classes that it has samples of; the code's clients have all",
            "the server's images come into being at the end of the first round, from the statistics that come with its "
            "answers; in the code clients train on them as noise in that round",
            "statistics are those of a class's own pixels; the code divides by the pixels of all classes",
            "all classes of a step are seen in one view, drawn once; the code draws one for each class",
            "matching to gradients has the recipe's loss in the place of cross-entropy",
            "a client keeps the server's images until there are others, so they cross the wire once",
        ),
        cost="The warm-up makes a new random net for each of its steps.",
    )
)
class FedLGD(Scheme):
    r"""One training in rounds on virtual images; real ones are looked at where they are, to distil from.

    .. math:: L_k = CE(x, y) + \lambda L_{con}(e(x) \cup e(S_g)), \qquad (x, y) \in S_k \cup S_g

    Before its first round a client distils its images from its own samples by mean features of random nets; every few
    rounds again, by the server's. In those rounds the loss is plain, and from the averaged step the server distils
    images of its own whose gradient points the same way. Across the wire go weights, the server's images, and once mean
    and deviation of the pixels of each class and channel.

    Args:
        count: Clients.
        alpha: Of the Dirichlet split; ``None``: equal parts.
        epochs: Of a client in a round.
        images: Virtual ones of a class, at a client.
        server_images: At the server.
        warm_up: Steps of distilling at a client, before its first round.
        match_steps: And when its images are made anew.
        server_steps: Of distilling at the server.
        every: Rounds between these.
        times: How often, after the first round.
        weight: :math:`\lambda`, of the pull towards the server's images.
        pull: ``"contrastive"``, ``"mmd"`` (five kernels) or ``"l2"`` (means of classes).
        temperature: Of the contrast.
        lr_images: Learning rate of images.
        real: Samples of a class in a step of distilling, at most.
        start: A client's images begin as noise of its statistics, ``"normal"``, or as samples of its own, ``"real"``.
        augment: Kinds of views of which one is drawn for each step; see ``same_view``.
        public: Share of the samples that no client has, for a fair comparison with methods that need such.
        fraction, clients, least, timeout: As in :class:`~limbeck.schemes.federated.fedavg.FedAvg`.

    Source: Federated Learning on Virtual Heterogeneous Data with Local-global Distillation, arXiv 2303.02278.

    >>> from limbeck.core.objective import Terms
    >>> from limbeck.data import as_loader
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import CrossEntropy
    >>> train = as_loader((torch.randn(40, 1, 4, 4), torch.arange(40) % 2), batch_size=8, train=True)
    >>> student = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    >>> cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(), train=train)
    >>> (training,) = FedLGD(count=2, alpha=None, server_images=3).trainings(cast)
    >>> training.stages[0].distiller.images.shape
    torch.Size([6, 1, 4, 4])
    """

    def __init__(
        self,
        count: int = 10,
        alpha: float | None = 0.1,
        epochs: int = 1,
        images: int = 50,
        server_images: int = 10,
        warm_up: int = 10000,
        match_steps: int = 100,
        server_steps: int = 500,
        every: int = 5,
        times: int = 10,
        weight: float = 1.0,
        pull: Pull = "contrastive",
        temperature: float = 0.07,
        lr_images: float = 1.0,
        real: int = 256,
        start: Start = "normal",
        augment: list[str] = list(KINDS),  # noqa: B006  never changed
        public: float = 0.0,
        fraction: float = 1.0,
        clients: Where = "simulated",
        least: int = 10,
        timeout: float | None = None,
    ) -> None:
        self.plan = Plan(count, clients, fraction, timeout)
        check_lengths(0, warm_up=warm_up, match_steps=match_steps, server_steps=server_steps, times=times)
        check_lengths(1, epochs=epochs, images=images, server_images=server_images, every=every, real=real)
        check_positive(temperature, "scheme.temperature")
        check_positive(lr_images, "scheme.lr_images")
        check_inside(weight, "scheme.weight", 0.0, 1e9, closed=True)
        check_kinds(augment)
        self.alpha, self.least, self.public = alpha, least, public
        self.virtual = Virtual(
            epochs=epochs,
            images=images,
            server_images=server_images,
            warm_up=warm_up,
            match_steps=match_steps,
            server_steps=server_steps,
            every=every,
            times=times,
            weight=weight,
            pull=pull,
            temperature=temperature,
            lr_images=lr_images,
            real=real,
            start=start,
            augment=tuple(augment),
        )

    def trainings(self, cast: Cast) -> Iterator[Training]:
        whole_batches(cast.config.accumulate, "fedlgd", "compares the images of a batch with one another")
        yield training_of("fedlgd", cast, lambda: self.server(cast))

    def server(self, cast: Cast) -> VirtualServer:
        """The server, with its clients and what they own."""
        of_labels(cast)
        owners = split_among(cast, "fedlgd", self.plan.count, self.alpha, self.least, self.public)
        inputs = owners.loaders[0].example(1).inputs
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or owners.loaders[0].classes is None:
            found = list(inputs.shape[1:]) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise DataError("virtual images are made of images with classes", where="data.source", found=found)
        return VirtualServer(cast, owners, self)


class VirtualServer(Federation):
    """The server of FedLGD, with images of its own; see :class:`FedLGD`."""

    images: Tensor
    version: Tensor
    held: Tensor

    def __init__(self, cast: Cast, owners: Owners, scheme: FedLGD) -> None:
        work = VirtualWork(cast, owners, scheme.virtual)
        facts = {**vars(scheme.virtual), "augment": list(scheme.virtual.augment), **owners.facts}
        super().__init__(cast, work, scheme.plan, facts)
        self.owners, self.virtual, self.virtual_work = owners, scheme.virtual, work
        self.pupil = (copy.deepcopy(cast.student),)  # in a tuple: no child, nothing that is saved
        self.register_buffer("images", torch.zeros(len(work.anchor_labels), *work.shape))
        self.register_buffer("version", torch.tensor(0))  # of the images; 0: there are none yet
        self.register_buffer("held", torch.zeros(scheme.plan.count, dtype=torch.long))  # which each client has

    def tell(self, number: int, place: Round) -> Tensors:
        told = under("weights", self.student.state_dict())
        return {**told, "images": self.images} if self.held[number] < self.version else told

    def hear(self, said: dict[int, Tensors], place: Round) -> Tensors:
        state = averaged({k: below("weights", tensors) for k, tensors in said.items()}, dict.fromkeys(said, 1.0))
        self.held[list(said)] = self.version
        if self.virtual.renews(place.number):
            with seeded(place.seed, place.number, _SERVER):
                if not self.version:
                    self.images.copy_(self.begun(said))
                self.images.copy_(self.matched(state, place))
            self.version += 1
        return state

    def begun(self, said: dict[int, Tensors]) -> Tensor:
        """Where the server's images begin: noise of the clients' mean statistics of each class."""
        found = [tensors for tensors in said.values() if "means" in tensors]
        present = torch.stack([tensors["present"] for tensors in found]).float()[..., None]
        count = present.sum(dim=0)
        # A class that nobody has is noise of mean 0 and deviation 1.
        means, deviations = (
            torch.where(count > 0, (torch.stack([t[name] for t in found]) * present).sum(0) / count.clamp(min=1), empty)
            for name, empty in (("means", 0.0), ("deviations", 1.0))
        )
        return noise(self.virtual_work.anchor_labels, means, deviations, self.virtual_work.shape)

    def matched(self, state: Tensors, place: Round) -> Tensor:
        """The server's images, moved to where their gradient points as the clients' averaged step does."""
        (pupil,) = self.pupil
        device = self.images.device
        pupil.load_state_dict(self.student.state_dict())
        pupil.to(device).eval()
        named = [(n, p) for n, p in pupil.named_parameters() if p.requires_grad]
        steps = [(p.detach() - state[n].to(device)) / place.config.lr for n, p in named]
        images = self.images.clone().requires_grad_()
        labels = self.virtual_work.anchor_labels.to(device)
        optimizer = torch.optim.SGD([images], lr=self.virtual.lr_images, momentum=0.5)
        distiller = Distiller(pupil, copy.deepcopy(self.loss), logits=self._logits)
        distiller.setup(Batch(self.images, labels))
        try:
            for _ in range(self.virtual.server_steps):
                total = distiller(Batch(images, labels)).total
                found = torch.autograd.grad(total, [p for _, p in named], create_graph=True)
                optimizer.zero_grad()
                (images.grad,) = torch.autograd.grad(gradient_loss(steps, found), [images])
                optimizer.step()
        finally:
            distiller.close()
        return images.detach()

"""The losses written once more, from the papers' equations, with plain loops over numbers."""

from __future__ import annotations

from math import exp, log, sqrt

from torch import Tensor


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [exp((z - max(row)) / temperature) for z in row]
    return [p / sum(powers) for p in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def kd(student: Tensor, teacher: Tensor, temperature: float) -> float:
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    return temperature**2 * mean([kl(softmax(t, temperature), softmax(s, temperature)) for s, t in pairs])


def dkd_parts(student: list[float], teacher: list[float], label: int, temperature: float) -> tuple[float, float]:
    s, t = softmax(student, temperature), softmax(teacher, temperature)
    tckd = kl([t[label], 1 - t[label]], [s[label], 1 - s[label]])
    s_hat = [p / (1 - s[label]) for c, p in enumerate(s) if c != label]
    t_hat = [p / (1 - t[label]) for c, p in enumerate(t) if c != label]
    return tckd, kl(t_hat, s_hat)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> float:
    values = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        tckd, nckd = dkd_parts(s, t, y, temperature)
        values.append(temperature**2 * (alpha * tckd + beta * nckd))
    return mean(values)


def pearson(x: list[float], y: list[float]) -> float:
    mx, my = mean(x), mean(y)
    cov = mean([(a - mx) * (b - my) for a, b in zip(x, y, strict=True)])
    return cov / sqrt(mean([(a - mx) ** 2 for a in x]) * mean([(b - my) ** 2 for b in y]))


def dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, tau: float) -> float:
    s = [softmax(row, tau) for row in student.tolist()]
    t = [softmax(row, tau) for row in teacher.tolist()]
    inter = mean([1 - pearson(a, b) for a, b in zip(s, t, strict=True)])
    columns = zip(zip(*s, strict=True), zip(*t, strict=True), strict=True)
    intra = mean([1 - pearson(list(a), list(b)) for a, b in columns])
    return tau**2 * (beta * inter + gamma * intra)


def at(student: Tensor, teacher: Tensor, p: float) -> float:
    """One layer of maps ``[B, C, H, W]`` of equal size."""

    def attention(maps: list) -> list[float]:
        height, width = len(maps[0]), len(maps[0][0])
        q = [sum(abs(c[h][w]) ** p for c in maps) for h in range(height) for w in range(width)]
        norm = sqrt(sum(v * v for v in q))
        return [v / norm for v in q]

    values = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        values.append(mean([(a - b) ** 2 for a, b in zip(attention(s), attention(t), strict=True)]))
    return mean(values)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def rkd_distance(student: Tensor, teacher: Tensor) -> float:
    def normalised(x: list[list[float]]) -> list[float]:
        d = [sqrt(sum((a - b) ** 2 for a, b in zip(p, q, strict=True))) for p in x for q in x]
        mu = mean([v for v in d if v > 0])
        return [v / mu for v in d]

    pairs = zip(normalised(student.tolist()), normalised(teacher.tolist()), strict=True)
    return mean([huber(s - t) for s, t in pairs])


def rkd_angle(student: Tensor, teacher: Tensor) -> float:
    def cosines(x: list[list[float]]) -> list[float]:
        found = []
        for corner in x:
            for one in x:
                for other in x:
                    u = [a - b for a, b in zip(one, corner, strict=True)]
                    v = [a - b for a, b in zip(other, corner, strict=True)]
                    size = sqrt(sum(a * a for a in u) * sum(a * a for a in v))
                    found.append(sum(a * b for a, b in zip(u, v, strict=True)) / size if size else 0.0)
        return found

    return mean([huber(s - t) for s, t in zip(cosines(student.tolist()), cosines(teacher.tolist()), strict=True)])


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def directions(x: Tensor) -> list[list[float]]:
    return [[v / sqrt(dot(row, row)) for v in row] for row in x.tolist()]


def crd_in_batch(student: Tensor, teacher: Tensor, temperature: float, labels: list[int] | None = None) -> float:
    s, t = directions(student), directions(teacher)
    size, values = len(s), []
    for i in range(size):
        allowed = [j for j in range(size) if j == i or labels is None or labels[j] != labels[i]]
        own = exp(dot(s[i], t[i]) / temperature)
        values.append(-log(own / sum(exp(dot(s[i], t[j]) / temperature) for j in allowed)))
        values[-1] -= log(own / sum(exp(dot(s[j], t[i]) / temperature) for j in allowed))
    return mean(values)


def crd_bank(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    index: Tensor,
    negatives: Tensor,
    z: tuple[float, float],
    temperature: float,
) -> float:
    sides = ((directions(student), teacher_bank.tolist(), z[0]), (directions(teacher), student_bank.tolist(), z[1]))
    noise = negatives.shape[1] / len(student_bank)
    values = []
    for i, (own, others) in enumerate(zip(index.tolist(), negatives.tolist(), strict=True)):
        value = 0.0
        for anchors, bank, constant in sides:
            h = [exp(dot(anchors[i], bank[j]) / temperature) / constant for j in [own, *others]]
            value -= log(h[0] / (h[0] + noise)) + sum(log(noise / (k + noise)) for k in h[1:])
        values.append(value)
    return mean(values)

"""The loss of one step of each method against its equation, and where its gradients go."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aslseg.compute.losses import clipped_noise, segmentation_loss
from aslseg.errors import BadSettingsError, BadWeightsError
from aslseg.registry import NETWORKS, SSL_METHODS
from aslseg.settings import load_settings
from aslseg.ssl.methods.base import Batch
from aslseg.ssl.methods.bcp import copy_paste_mask, largest_components
from aslseg.ssl.methods.dtc import signed_distance
from aslseg.ssl.methods.mcnet import sharpened
from aslseg.ssl.networks import VNet
from aslseg.types import Labels

METHODS = list(SSL_METHODS)
PART = 0.6
RAMP = math.exp(-5 * 0.4**2)
SIZE = (16, 16, 16)


def method_for(name: str, labels: str = "one,two", seed: int = 0, **conf: str):
    """A method over the simplest network there is, or for mcnet over the smallest V-Net."""
    settings = load_settings({"labels": labels, "ssl_method": name, **conf}, env={})[0]
    classes = len(settings.label_set) + 1

    def network(extra: int = 0) -> nn.Module:
        if name == "mcnet":
            return VNet(classes + extra, filters=1, dropout=0, head_dropout=0)
        return nn.Conv3d(1, classes + extra, 3, padding=1)

    torch.manual_seed(seed)
    return SSL_METHODS.get(name)(network, settings).train()


def batch_of(classes: int = 3, labelled: int = 2, unlabelled: int = 2) -> Batch:
    rng = torch.Generator().manual_seed(11)
    target = torch.randint(0, classes, (labelled, *SIZE), generator=rng)
    image = torch.randn(labelled, 1, *SIZE, generator=rng) + target[:, None]
    weight = torch.rand(labelled, *SIZE, generator=rng)
    free = torch.randn(unlabelled, 1, *SIZE, generator=rng)
    return Batch(image, target, weight, free, free + 0.1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def loss_of(method, batch: Batch, part: float = PART) -> Tensor:
    return method.loss(batch, part, generator())[0]


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return torch.autograd.grad(loss, list(module.parameters()))


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.allclose(f, e, rtol=1e-3, atol=1e-6) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_all_that_is_trained_and_no_teacher(name):
    method = method_for(name)
    loss_of(method, batch_of()).backward()
    teachers = [p for n, p in method.named_parameters() if n.startswith("teacher.")]
    trained = [p for n, p in method.named_parameters() if not n.startswith("teacher.")]
    assert len(teachers) == (2 if name in ("mean_teacher", "ua_mt", "bcp", "bcp_mt") else 0)
    assert all(p.grad is None and not p.requires_grad for p in teachers)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("name", ["mean_teacher", "ua_mt", "bcp", "bcp_mt"])
def test_the_teacher_follows_and_predicts(name):
    method = method_for(name, ema_decay="0.9")
    method.student.weight.data += 1
    before = method.teacher.weight.clone()
    method.after_step(1000, 0.5)
    assert torch.allclose(method.teacher.weight, 0.9 * before + 0.1 * method.student.weight, atol=1e-6)
    assert method.predictor is method.teacher


def test_mean_teacher_step():
    method, batch = method_for("mean_teacher", consistency="0.5"), batch_of()
    method.teacher.weight.data *= 1.5
    noisy = batch.unlabelled + clipped_noise(batch.unlabelled, generator())
    p, q = method.student(batch.unlabelled).softmax(1), method.teacher(noisy).softmax(1)
    expected = segmentation_loss(method.student(batch.image), batch.target, batch.weight)
    expected = expected + 0.5 * RAMP * ((p - q.detach()) ** 2).mean()
    found = loss_of(method, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert same(gradients(found, method.student), gradients(expected, method.student))


def test_ua_mt_step_learns_only_where_eight_passes_are_certain():
    method, batch = method_for("ua_mt", consistency="5"), batch_of()
    method.teacher.weight.data *= 4
    rng, passes = generator(), []
    method.teacher.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        q, *noisy = [
            method.teacher(batch.unlabelled + clipped_noise(batch.unlabelled, rng)).softmax(1).double()
            for _ in range(9)
        ]
    mean = torch.stack(noisy).mean(0)
    entropy = -(mean * (mean + 1e-6).log()).sum(1)
    certain = entropy < (0.75 + 0.25 * RAMP) * math.log(3)
    assert 0.05 < certain.float().mean() < 0.95
    p = method.student(batch.unlabelled).softmax(1)
    squares = ((p - q) ** 2).sum(1)
    expected = segmentation_loss(method.student(batch.image), batch.target, batch.weight)
    expected = expected + 5 * RAMP * squares[certain].sum() / (3 * certain.sum())
    passes.clear()
    found = loss_of(method, batch)
    assert len(passes) == 9
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert same(gradients(found, method.student), gradients(expected.float(), method.student))


def test_cps_step_passes_no_gradient_through_pseudo_labels():
    method, batch = method_for("cps", consistency="2"), batch_of()
    one, two = method.student(batch.unlabelled), method.second(batch.unlabelled)
    assert not torch.equal(one.argmax(1), two.argmax(1))
    first = segmentation_loss(method.student(batch.image), batch.target, batch.weight)
    first = first + 2 * RAMP * F.cross_entropy(one, two.argmax(1))
    second = segmentation_loss(method.second(batch.image), batch.target, batch.weight)
    second = second + 2 * RAMP * F.cross_entropy(two, one.argmax(1))
    found = loss_of(method, batch)
    assert found.item() == pytest.approx((first + second).item(), rel=1e-5)
    # each network's gradient is that of its own two terms alone
    assert same(gradients(loss_of(method, batch), method.student), gradients(first, method.student))
    assert same(gradients(loss_of(method, batch), method.second), gradients(second, method.second))


def test_cps_networks_start_from_kaiming_and_xavier():
    settings = load_settings({"ssl_method": "cps"}, env={})[0]
    torch.manual_seed(0)
    method = SSL_METHODS.get("cps")(lambda extra=0: nn.Conv3d(16, 64, 3), settings)
    # standard deviations sqrt(2 / fan_in) and sqrt(2 / (fan_in + fan_out)), fans 16 * 27 and 64 * 27
    assert method.student.weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 27)), rel=0.02)
    assert method.second.weight.std().item() == pytest.approx(math.sqrt(2 / (80 * 27)), rel=0.02)
    assert method.predictor is method.student


def test_dtc_step():
    method, batch = method_for("dtc"), batch_of()
    assert method.extra_outputs == 2
    output = method.student(torch.cat([batch.image, batch.unlabelled]))
    p, d = output[:, :3].softmax(1), torch.tanh(output[:, 3:])
    w = batch.weight
    dice, distance = [], 0.0
    for c in (1, 2):
        y = (batch.target == c).float()
        overlap = (w * p[:2, c] * y).sum()
        dice.append(1 - (2 * overlap + 1e-5) / ((w * p[:2, c] ** 2).sum() + (w * y).sum() + 1e-5))
        error = (d[:2, c - 1] - signed_distance(batch.target, 3)[:, c - 1]) ** 2
        distance = distance + (w * error).sum() / w.sum() / 2
    agree = ((torch.sigmoid(-1500 * d) - p[:, 1:]) ** 2).mean()
    expected = (dice[0] + dice[1]) / 2 + 0.3 * distance + 1.0 * RAMP * agree
    found = loss_of(method, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert same(gradients(found, method.student), gradients(expected, method.student))


def test_dtc_with_one_class_is_the_papers_single_sigmoid():
    method, batch = method_for("dtc", labels="one"), batch_of(classes=2)
    output = method.student(torch.cat([batch.image, batch.unlabelled]))
    p, d = torch.sigmoid(output[:, 1] - output[:, 0]), torch.tanh(output[:, 2])
    y, w = batch.target.float(), batch.weight
    dice = 1 - (2 * (w * p[:2] * y).sum() + 1e-5) / ((w * p[:2] ** 2).sum() + (w * y).sum() + 1e-5)
    distance = (w * (d[:2] - signed_distance(batch.target, 2)[:, 0]) ** 2).sum() / w.sum()
    expected = dice + 0.3 * distance + RAMP * ((torch.sigmoid(-1500 * d) - p) ** 2).mean()
    assert loss_of(method, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_signed_distance_of_a_line():
    # a class of five voxels in a line of ten, then 4/4, 3/4 ... 1/4 outside on the left
    line = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 0]).reshape(1, 10, 1, 1)
    found = signed_distance(line, 2)
    # inside distances 1 2 3 2 1: the ends are boundary, the middle is as deep as it gets
    expected = [1, 0.75, 0.5, 0.25, 0, -2 / 3, -1, -2 / 3, 0, 0.25]
    assert found.shape == (1, 1, 10, 1, 1)
    assert found.flatten().tolist() == pytest.approx(expected)


def test_signed_distance_of_a_cube_and_of_classes_that_are_not_there():
    cube = torch.zeros(2, 7, 7, 7, dtype=torch.long)
    cube[0, 2:5, 2:5, 2:5] = 1
    cube[1] = 2
    found = signed_distance(cube, 3)
    # the cube's centre is 2 voxels deep, all its other voxels are boundary; the corner of the patch is farthest
    assert found[0, 0, 3, 3, 3] == -1
    assert (found[0, 0, 2:5, 2:5, 2:5] == 0).sum() == 26
    assert found[0, 0, 0, 0, 0] == 1
    assert found[0, 0, 3, 3, 6].item() == pytest.approx(2 / math.sqrt(12))
    assert (found[0, 1] == 1).all()
    assert (found[1, 0] == 1).all()
    assert (found[1, 1] == -1).all()


def test_mcnet_step_passes_gradients_through_both_sides():
    method, batch = method_for("mcnet", consistency="3"), batch_of()
    features = method.student.encode(torch.cat([batch.image, batch.unlabelled]))
    decoders = [method.student.decode, *method.others]
    p = [decode(features).softmax(1).double() for decode in decoders]
    firm = [one**10 / (one**10).sum(1, keepdim=True) for one in p]
    w = batch.weight
    loss = 0.0
    for one in p:
        for c in (1, 2):
            y = (batch.target == c).double()
            loss = loss + 0.5 * (1 - 2 * (w * one[:2, c] * y).sum() / ((w * one[:2, c]).sum() + (w * y).sum())) / 2
    for d in range(3):
        for e in range(3):
            if d != e:
                loss = loss + 3 * RAMP * ((p[d] - firm[e]) ** 2).mean()
    found = loss_of(method, batch)
    assert found.item() == pytest.approx(loss.item(), rel=1e-4)
    got, expected = gradients(found, method.others), gradients(loss, method.others)
    assert max((g - e).abs().max().item() for g, e in zip(got, expected, strict=True)) < 1e-4


def test_sharpened_probabilities():
    # 0.6^10 / (0.6^10 + 0.4^10)
    logits = torch.tensor([0.6, 0.4]).log().reshape(1, 2, 1, 1, 1)
    assert sharpened(logits)[0, 0].item() == pytest.approx(0.6**10 / (0.6**10 + 0.4**10), abs=1e-6)


def test_mcnet_publishes_a_plain_vnet():
    method = method_for("mcnet")
    VNet(3, filters=1).load_state_dict(method.predictor.state_dict())
    features = method.student.encode(batch_of().image)
    one, two, three = (decode(features) for decode in (method.student.decode, *method.others))
    assert torch.equal(method(batch_of().image), one) or torch.allclose(method(batch_of().image), one, atol=1e-5)
    assert not torch.allclose(one, two)
    assert not torch.allclose(two, three)


def test_mcnet_says_which_networks_it_can_use():
    settings = load_settings({"ssl_method": "mcnet", "network": "unet"}, env={})[0]
    with pytest.raises(BadSettingsError, match=r"network = unet is no V-Net.*vnet_small"):
        SSL_METHODS.get("mcnet")(lambda extra=0: NETWORKS.get("unet")(2 + extra, SIZE), settings)


def paste(a: Tensor, b: Tensor, outside: Tensor) -> Tensor:
    return a * outside + b * (1 - outside)


def published_part(z: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """(CE + Dice) / 2 of one region, patch by patch and class by class."""
    ce, dice = F.cross_entropy(z, y, reduction="none"), []
    for n in range(len(z)):
        for c in range(z.shape[1]):
            p, t = z[n].softmax(0)[c], (y[n] == c).float()
            dice.append(1 - (2 * (p * t * mask).sum() + 1e-5) / (((p + t) * mask).sum() + 1e-5))
    return ((ce * mask).sum() / (mask.sum() * len(z)) + torch.stack(dice).mean()) / 2


def test_bcp_self_training_is_the_published_loss():
    method, drawn = method_for("bcp"), batch_of()
    batch = Batch(drawn.image, drawn.target, torch.ones_like(drawn.weight), drawn.unlabelled, drawn.weak)
    method.teacher.weight.data *= 2
    m = copy_paste_mask(torch.Size(SIZE), generator())
    x, y, u = batch.image, batch.target, batch.unlabelled
    v = largest_components(method.teacher(u).argmax(1), Labels.parse("one,two"))
    assert (v > 0).any()
    z_in, z_out = method.student(paste(x, u, m)), method.student(paste(u, x, m))
    human = published_part(z_in, y, m) + published_part(z_out, y, 1 - m)
    machine = published_part(z_in, v, 1 - m) + published_part(z_out, v, m)
    expected = human + 0.5 * machine
    found = loss_of(method, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert same(gradients(found, method.student), gradients(expected, method.student))


def test_bcp_mt_step_keeps_labelled_patches_whole_and_trusts_the_teachers_margin():
    method, batch = method_for("bcp_mt"), batch_of()
    method.teacher.weight.data *= 2
    part, rng = 0.6 + 0.4 * 0.15, generator()
    m = copy_paste_mask(torch.Size(SIZE), rng)
    if torch.rand(1, generator=rng) < 0.5:
        m = 1 - m
    q = method.teacher(batch.weak).softmax(1).sort(dim=1, descending=True)
    margin = (q.values[:, 0] - q.values[:, 1]).detach()
    target = paste(q.indices[:, 0].float(), batch.target.float(), m).long()
    mixed = segmentation_loss(
        method.student(paste(batch.unlabelled, batch.image, m)), target, paste(margin, batch.weight, m)
    )
    supervised = segmentation_loss(method.student(batch.image), batch.target, batch.weight)
    expected = supervised + 0.5 * math.exp(-5 * 0.5**2) * mixed
    found = loss_of(method, batch, part)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert same(gradients(found, method.student), gradients(expected, method.student))


@pytest.mark.parametrize(("part", "unlabelled"), [(0.2, 2), (0.9, 0)])
def test_bcp_pastes_labelled_into_labelled_at_first_or_without_others(part, unlabelled):
    method, drawn = method_for("bcp"), batch_of(unlabelled=unlabelled)
    batch = Batch(drawn.image, drawn.target, torch.ones_like(drawn.weight), drawn.unlabelled, drawn.weak)
    m = copy_paste_mask(torch.Size(SIZE), generator())
    x, y = batch.image, batch.target
    z, mixed = method.student(paste(x, x.flip(0), m)), paste(y, y.flip(0), m).long()
    expected = published_part(z, mixed, torch.ones(SIZE))
    assert loss_of(method, batch, part).item() == pytest.approx(expected.item(), rel=1e-4)


def test_bcp_human_weights_count_and_shorter_streams_are_repeated():
    method, batch = method_for("bcp"), batch_of(labelled=1, unlabelled=2)
    ignored = Batch(batch.image, batch.target, torch.zeros_like(batch.weight), batch.unlabelled, batch.weak)
    other = Batch(batch.image, (batch.target + 1) % 3, torch.zeros_like(batch.weight), batch.unlabelled, batch.weak)
    assert loss_of(method, ignored).item() == loss_of(method, other).item()
    assert loss_of(method, batch).item() > loss_of(method, ignored).item()


def test_copy_paste_mask_is_a_box_of_two_thirds():
    mask = copy_paste_mask(torch.Size((12, 9, 6)), torch.Generator().manual_seed(1))
    inside = (mask == 0).nonzero()
    assert (inside.max(0).values - inside.min(0).values + 1).tolist() == [8, 6, 4]
    assert len(inside) == 8 * 6 * 4
    papers = copy_paste_mask(torch.Size((112, 112, 80)), torch.Generator().manual_seed(1))
    assert (papers == 0).sum().item() == 74 * 74 * 53


def test_copy_paste_boxes_lie_anywhere():
    rng = torch.Generator().manual_seed(3)
    firsts = [int((copy_paste_mask(torch.Size((6, 1, 1)), rng) == 0).nonzero()[0, 0]) for _ in range(60)]
    assert set(firsts) == {0, 1, 2}


def test_largest_components_per_class():
    maps = torch.tensor([1, 1, 0, 1, 2, 2, 0, 2]).reshape(1, 8, 1, 1)
    found = largest_components(maps, Labels.parse("a,b"))
    assert found.flatten().tolist() == [1, 1, 0, 0, 2, 2, 0, 0]
    assert largest_components(torch.zeros(1, 8, 1, 1, dtype=torch.long), Labels.parse("a,b")).sum() == 0


def test_an_organ_keeps_all_of_its_lesions_and_loses_those_elsewhere():
    maps = torch.tensor([2, 1, 1, 2, 1, 0, 2, 0, 1]).reshape(1, 9, 1, 1)
    found = largest_components(maps, Labels.parse("liver,tumour", "tumour:liver"))
    assert found.flatten().tolist() == [2, 1, 1, 2, 1, 0, 0, 0, 0]


def test_components_touch_by_corners():
    maps = torch.zeros(1, 3, 3, 3, dtype=torch.long)
    maps[0, 0, 0, 0] = maps[0, 1, 1, 1] = 1
    assert torch.equal(largest_components(maps, Labels.parse("a")), maps)


@pytest.mark.parametrize("source", METHODS)
@pytest.mark.parametrize("name", METHODS)
def test_warm_start_from_another_method_works_or_is_refused(name, source):
    def made(method: str, seed: int):
        settings = load_settings({"labels": "one", "ssl_method": method}, env={})[0]
        torch.manual_seed(seed)
        return SSL_METHODS.get(method)(lambda extra=0: VNet(2 + extra, filters=1), settings)

    state = made(source, 1).predictor.state_dict()
    method = made(name, 2)
    if (name == "dtc") != (source == "dtc"):
        with pytest.raises(BadWeightsError, match=rf"ssl_method = {name}.*head\.weight.*same network and method"):
            method.start_from(state)
        return
    method.start_from(state)
    assert all(torch.equal(v, state[k]) for k, v in method.predictor.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in method.student.state_dict().items())


def test_warm_start_keeps_what_makes_networks_differ():
    state = method_for("cps", seed=1).predictor.state_dict()
    method = method_for("cps", seed=2)
    method.start_from(state)
    assert not torch.equal(method.second.weight, method.student.weight)
    state = method_for("mcnet", seed=1).predictor.state_dict()
    method = method_for("mcnet", seed=2)
    method.start_from(state)
    for decoder in method.others:
        assert torch.equal(decoder.head.weight, state["head.weight"])
        assert torch.equal(decoder.decoder[0][0].weight, state["decoder.0.0.weight"])


@pytest.mark.parametrize(("name", "begin"), [("bcp", 0.25), ("bcp_mt", 0.6)])
def test_the_teacher_is_asked_after_the_labelled_phase_and_at_once_in_a_warm_start(name, begin):
    method, batch = method_for(name), batch_of()
    calls: list[int] = []
    method.teacher.register_forward_hook(lambda *_: calls.append(1))
    loss_of(method, batch, part=0.0)
    loss_of(method, batch, part=begin - 0.01)
    assert not calls
    loss_of(method, batch, part=begin)
    assert calls
    calls.clear()
    method.start_from(method.predictor.state_dict())
    loss_of(method, batch, part=0.0)
    assert calls


def test_bfloat16_logits_give_finite_losses():
    for name in METHODS:
        method = method_for(name)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(method, batch_of())
        assert loss.dtype == torch.float32
        assert np.isfinite(loss.item())


class Fixed(nn.Module):
    """A network that gives the same output for every patch."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output


class Halves(nn.Module):
    """Encoder and decoder of a network that gives the same output for every patch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.encode, self.decode = nn.Identity(), network


def drawing(name: str, logits: Tensor):
    """A method whose networks all give these logits; without a consistency term, which is between networks."""
    method = method_for(name, "liver,tumour", nested="tumour:liver", consistency="0")
    fixed = Fixed(torch.cat([logits, torch.zeros_like(logits[:, 1:])], 1) if name == "dtc" else logits)
    if name == "mcnet":
        method.student = Halves(fixed)
        method.others = nn.ModuleList([fixed, fixed])
    else:
        method.student = fixed
    if name == "cps":
        method.second = fixed
    return method


@pytest.mark.parametrize("name", METHODS)
def test_labels_left_open_teach_nothing_of_what_lies_in_them(name):
    """Whether the liver's probability is that of tumour or of liver is the same to the loss where that is left open."""
    batch = batch_of(unlabelled=0)
    # equal patches, which copy-paste leaves as they are
    liver = (batch.target[:1] > 0).expand_as(batch.target)
    left_open = replace(batch, target=torch.where(liver, 3, 0))
    torch.manual_seed(0)
    logits = torch.randn(2, 3, *SIZE)
    share = torch.rand(2, 1, *SIZE)
    whole = logits[:, 1:].logsumexp(1, keepdim=True)
    moved = torch.cat([logits[:, :1], whole + share.log(), whole + (1 - share).log()], 1)
    moved = torch.where(liver[:, None], moved, logits)
    losses = [loss_of(drawing(name, z), left_open).item() for z in (logits, moved)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    known = replace(batch, target=liver.long())
    told = [loss_of(drawing(name, z), known).item() for z in (logits, moved)]
    assert told[0] != pytest.approx(told[1], rel=1e-4)
    # the liver itself is learned
    surer = torch.where(liver[:, None] & (torch.arange(3) > 0)[None, :, None, None, None], logits + 2, logits)
    assert loss_of(drawing(name, surer), left_open).item() < losses[0]

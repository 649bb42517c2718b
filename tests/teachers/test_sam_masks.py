"""Prompt encoder and mask decoder of SAM against a forward in plain torch over a file's keys, and against transformers."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from teachers.base import TeacherError, WeightsNotFoundError
from teachers.registry import create_teacher
from teachers.sam_layout import to_authors
from teachers.sam_masks import box_prompts, build_sam_masks, load_sam_masks, point_prompts, read_sam, to_shares
from tests.teachers.plain import draw_pixels, linear, norm
from tests.teachers.sam_files import (
    BLOCKS,
    DIM,
    ENCODER_ARGS,
    MASKS,
    SIDE,
    authors_file,
    decoder_shapes,
    library_file,
    small_library_model,
)

EPS = 1e-5
HEADS = 8


def attention(w, key, queries, keys, values):
    """Head by head."""
    q, k, v = (linear(w, f"{key}.{n}_proj", x) for n, x in (("q", queries), ("k", keys), ("v", values)))
    parts = []
    for head in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
        logits = head[0] @ head[1].T / math.sqrt(head[0].shape[-1])
        parts.append(logits.softmax(-1) @ head[2])
    return linear(w, f"{key}.out_proj", torch.cat(parts, -1))


def position(w, x, y):
    """Of one point in [0, 1]."""
    frequencies = w["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    angles = 2 * math.pi * ((2 * x - 1) * frequencies[0] + (2 * y - 1) * frequencies[1])
    return torch.cat([torch.sin(angles), torch.cos(angles)])


def perceptron(w, key, x, layers=3):
    for number in range(layers):
        x = linear(w, f"{key}.layers.{number}", x)
        x = F.relu(x) if number < layers - 1 else x
    return x


def forward(w, embedding, prompts):
    """Masks [M, 4 h, 4 w] and IoU [M] of one image [D, h, w] and one prompt: (x, y, label) in pixels of 1024."""
    tokens = [w["mask_decoder.iou_token.weight"][0], *w["mask_decoder.mask_tokens.weight"]]
    for x, y, label in prompts:
        if label == -1:
            tokens.append(w["prompt_encoder.not_a_point_embed.weight"][0])
        else:
            kind = w[f"prompt_encoder.point_embeddings.{label}.weight"][0]
            tokens.append(position(w, (x + 0.5) / 1024, (y + 0.5) / 1024) + kind)
    tokens = torch.stack(tokens)
    _, height, width = embedding.shape
    places = torch.stack(
        [position(w, (c + 0.5) / width, (r + 0.5) / height) for r in range(height) for c in range(width)]
    )
    image = embedding.flatten(1).T + w["prompt_encoder.no_mask_embed.weight"]
    codes, t = tokens, "mask_decoder.transformer"
    for block in range(BLOCKS):
        key = f"{t}.layers.{block}"
        if block == 0:
            tokens = attention(w, f"{key}.self_attn", tokens, tokens, tokens)
        else:
            tokens = tokens + attention(w, f"{key}.self_attn", tokens + codes, tokens + codes, tokens)
        tokens = norm(w, f"{key}.norm1", tokens, EPS)
        read = attention(w, f"{key}.cross_attn_token_to_image", tokens + codes, image + places, image)
        tokens = norm(w, f"{key}.norm2", tokens + read, EPS)
        changed = linear(w, f"{key}.mlp.lin2", F.relu(linear(w, f"{key}.mlp.lin1", tokens)))
        tokens = norm(w, f"{key}.norm3", tokens + changed, EPS)
        told = attention(w, f"{key}.cross_attn_image_to_token", image + places, tokens + codes, tokens)
        image = norm(w, f"{key}.norm4", image + told, EPS)
    read = attention(w, f"{t}.final_attn_token_to_image", tokens + codes, image + places, image)
    tokens = norm(w, f"{t}.norm_final_attn", tokens + read, EPS)
    up = "mask_decoder.output_upscaling"
    grown = image.T.reshape(1, DIM, height, width)
    grown = F.conv_transpose2d(grown, w[f"{up}.0.weight"], w[f"{up}.0.bias"], stride=2)
    grown = norm(w, f"{up}.1", grown.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)
    grown = F.gelu(F.conv_transpose2d(F.gelu(grown), w[f"{up}.3.weight"], w[f"{up}.3.bias"], stride=2))[0]
    masks = [
        (perceptron(w, f"mask_decoder.output_hypernetworks_mlps.{m}", tokens[1 + m])[:, None, None] * grown).sum(0)
        for m in range(MASKS)
    ]
    return torch.stack(masks), perceptron(w, "mask_decoder.iou_prediction_head", tokens[0])


@pytest.fixture(params=["authors", "transformers"])
def file(request, tmp_path):
    """A seeded SAM in one of the two layouts."""
    tensors = authors_file()
    if request.param == "authors":
        torch.save(tensors, tmp_path / "sam.pth")
        return tmp_path / "sam.pth"
    save_file(library_file(tensors), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
def test_both_layouts_give_the_published_forward_on_any_grid(file, grid):
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, DIM, *grid, generator=generator)
    masks, weights = load_sam_masks(str(file)), authors_file()
    assert masks.dim == DIM
    points = torch.rand(2, 3, 2, 2, generator=generator) * 1000
    labels = torch.tensor([[1, 0], [1, 1], [0, 1]]).expand(2, -1, -1)
    shares, kinds = (
        part.unflatten(0, (2, 3))
        for part in point_prompts(to_shares(points, 1024, 1024).flatten(0, 1), labels.flatten(0, 1))
    )
    logits, iou = masks(embeddings, shares, kinds)
    assert logits.shape == (2, 3, MASKS, 4 * grid[0], 4 * grid[1])
    for image in range(2):
        for prompt in range(3):
            given = [
                (*xy, kind)
                for xy, kind in zip(points[image, prompt].tolist(), labels[image, prompt].tolist(), strict=True)
            ]
            expected = forward(weights, embeddings[image], [*given, (0, 0, -1)])
            torch.testing.assert_close((logits[image, prompt], iou[image, prompt]), expected, atol=1e-4, rtol=0)
    boxes = torch.tensor([[100.0, 50.0, 700.0, 900.0]])
    shares, kinds = box_prompts(boxes)
    logits, iou = masks(embeddings[:1], to_shares(shares, 1024, 1024)[None], kinds[None])
    expected = forward(weights, embeddings[0], [(100, 50, 2), (700, 900, 3)])
    torch.testing.assert_close((logits[0, 0], iou[0, 0]), expected, atol=1e-4, rtol=0)


def test_every_key_of_the_published_files_has_its_place():
    built = build_sam_masks(authors_file())
    assert {key: tuple(value.shape) for key, value in built.state_dict().items()} == decoder_shapes()
    assert to_authors(library_file(authors_file())).keys() == authors_file().keys()


@torch.no_grad()
def test_the_image_encoder_loads_from_both_layouts(file, tmp_path):
    teacher = create_teacher("sam/vit_b", weights=str(file), input_size=16 * SIDE, pool=1, args=ENCODER_ARGS)
    teacher.check()
    teacher.load()
    other = tmp_path / "other.pth"
    torch.save(authors_file(), other)
    same = create_teacher("sam/vit_b", weights=str(other), input_size=16 * SIDE, pool=1, args=ENCODER_ARGS)
    same.load()
    pixels = draw_pixels(1, 16 * SIDE)
    assert torch.equal(teacher.encode(pixels).patches, same.encode(pixels).patches)


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-5, 1e-6], ids=["the authors' epsilon", "that of transformers"])
def test_the_features_of_the_teacher_give_the_masks_of_transformers(tmp_path, eps):
    model = small_library_model(eps)
    model.save_pretrained(tmp_path)
    file, size = str(tmp_path / "model.safetensors"), 16 * SIDE
    teacher = create_teacher("sam/vit_b", weights=file, input_size=size, pool=1, args=ENCODER_ARGS)
    teacher.load()
    pixels = draw_pixels(2, size)
    embeddings = teacher.encode(pixels).patches.permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (teacher.spec.mean, teacher.spec.std))
    torch.testing.assert_close(embeddings, model.get_image_embeddings((pixels / 255 - mean) / std), atol=1e-4, rtol=0)
    masks = build_sam_masks(read_sam(file))
    points, labels = torch.rand(2, 3, 1, 2) * size, torch.ones(2, 3, 1, dtype=torch.int64)
    given = point_prompts(to_shares(points, size, size, size).flatten(0, 1), labels.flatten(0, 1))
    logits, iou = masks(embeddings, *(part.unflatten(0, (2, 3)) for part in given))
    expected = model(image_embeddings=embeddings, input_points=points, input_labels=labels, multimask_output=True)
    torch.testing.assert_close(logits[:, :, 1:], expected.pred_masks, atol=1e-4, rtol=0)
    torch.testing.assert_close(iou[:, :, 1:], expected.iou_scores, atol=1e-4, rtol=0)
    boxes = torch.rand(2, 3, 4) * size / 2
    boxes[..., 2:] += boxes[..., :2]
    corners, kinds = box_prompts(boxes.flatten(0, 1))
    shares = to_shares(corners, size, size, size).unflatten(0, (2, 3))
    logits, _ = masks(embeddings, shares, kinds.unflatten(0, (2, 3)))
    expected = model(image_embeddings=embeddings, input_boxes=boxes, multimask_output=False)
    torch.testing.assert_close(logits[:, :, :1], expected.pred_masks, atol=1e-4, rtol=0)


def test_files_that_are_no_whole_sam_are_refused_with_the_remedy(tmp_path):
    encoder = {key: value for key, value in authors_file().items() if key.startswith("image_encoder.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    with pytest.raises(TeacherError, match=r"must be a whole SAM .*sam_vit_b_01ec64\.pth"):
        load_sam_masks(str(tmp_path / "encoder.pth"))
    damaged = authors_file()
    del damaged["mask_decoder.transformer.layers.1.norm4.bias"]
    with pytest.raises(TeacherError, match=r"lacks mask_decoder\.transformer\.layers\.1\.norm4\.bias"):
        build_sam_masks(damaged)
    with pytest.raises(WeightsNotFoundError, match=r"there is no file .*none\.pth"):
        load_sam_masks(str(tmp_path / "none.pth"))


def test_random_weights_are_those_of_the_seed():
    first, same, other = (load_sam_masks(f"random:{seed}").state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    assert not torch.equal(first["mask_decoder.iou_token.weight"], other["mask_decoder.iou_token.weight"])
    assert first["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape == (2048, 256)

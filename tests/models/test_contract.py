"""The contract of an smp model, proved by every encoder: a class of tests to inherit from."""

import copy
import json
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import effseg
from effseg import EffSeg, InputError

ANY_SIZE = [(500, 375), (67, 71), (97, 33), (64 + 3, 64 + 7)]


class ModelContract:
    """Tests that any encoder must pass; a subclass names the encoder."""

    encoder_name: str
    dynamic = True
    small: ClassVar = {
        "decoder_channels": 16,
        "decoder_layers": 2,
        "head_channels": 24,
        "head_layers": 2,
    }

    def build(self, **kwargs) -> EffSeg:
        torch.manual_seed(0)
        arguments = {**self.small, "encoder_weights": None, **kwargs}
        return EffSeg(self.encoder_name, **arguments)

    @staticmethod
    def image(height=64, width=64, batch=1, channels=3):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, channels, height, width, generator=generator)

    def test_forward_and_backward_with_one_image_in_train_mode(self):
        model = self.build(classes=1).train()
        logits = model(self.image())
        assert logits.shape == (1, 1, 64, 64)
        logits.square().mean().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None]
        assert without == []

    def test_one_channel_depth_three_seven_classes(self):
        model = self.build(in_channels=1, encoder_depth=3, classes=7).train()
        logits = model(self.image(72, 40, batch=2, channels=1))
        assert logits.shape == (2, 7, 72, 40)
        logits.mean().backward()
        assert len(model.preprocess_cfg["mean"]) == 1

    def test_classification_head(self):
        params = {"pooling": "avg", "classes": 10, "dropout": 0.5, "activation": "sigmoid"}
        model = self.build(classes=3, aux_params=params).eval()
        with torch.no_grad():
            masks, labels = model(self.image(67, 71, batch=2))
        assert masks.shape == (2, 3, 67, 71)
        assert labels.shape == (2, 10)
        assert labels.min() >= 0 and labels.max() <= 1

    @pytest.mark.parametrize("size", ANY_SIZE, ids=str)
    def test_any_resolution(self, size):
        model = self.build(classes=3).eval()
        with torch.no_grad():
            logits = model(self.image(*size))
        assert logits.shape == (1, 3, *size)
        assert logits.isfinite().all()

    def test_save_and_load(self, tmp_path, monkeypatch, smp_registered):
        cfg = {
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "input_space": "RGB",
            "input_range": [0.0, 1.0],
        }
        model = self.build(classes=5, decoder_fusion="softmax", preprocess_cfg=cfg).eval()
        model.config["encoder_weights"] = "imagenet"  # as if it had been made with them
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["preprocess_cfg"] == cfg
        assert saved["encoder_weights"] == "imagenet"

        def refuse(*args, **kwargs):
            raise AssertionError("the encoder's weights were fetched again")

        monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
        monkeypatch.setattr(smp_registered.encoders, "hf_hub_download", refuse)
        with torch.no_grad():
            expected = model(self.image(70, 45))
            for load in (
                effseg.from_pretrained,
                EffSeg.from_pretrained,
                smp_registered.from_pretrained,
            ):
                again = load(tmp_path).eval()
                assert isinstance(again, EffSeg)
                torch.testing.assert_close(again(self.image(70, 45)), expected, rtol=0, atol=0)
                assert again.preprocess_cfg == cfg
                assert again.config["preprocess_cfg"] == cfg
                assert again.config["encoder_weights"] == "imagenet"

    def test_loading_with_other_classes_drops_the_classifier_only(self, tmp_path):
        model = self.build(classes=5)
        model.save_pretrained(tmp_path)
        with pytest.raises(effseg.InputError, match=r"5 classes saved, 2 asked; strict=False"):
            effseg.from_pretrained(tmp_path, classes=2)
        with pytest.warns(UserWarning, match="classifier"):
            other = effseg.from_pretrained(tmp_path, strict=False, classes=2)
        old, new = model.state_dict(), other.state_dict()
        same = {key for key in old if old[key].shape == new[key].shape}
        by_class = ("classifier.", "head.context.", "refinement.correct.")
        mixed = ("refinement.mix.0.depthwise.weight", "refinement.mix.0.pointwise.weight")
        assert set(old) - same == {
            k for k in old if any(part in k for part in by_class) or k.endswith(mixed)
        }
        assert all(torch.equal(old[key], new[key]) for key in same)

    def test_predict_is_eval_without_gradient(self):
        model = self.build(classes=2).train()
        masks = model.predict(self.image())
        assert not model.training
        assert masks.is_inference()
        assert masks.shape == (1, 2, 64, 64)

    def test_frozen_encoder_stays_frozen_in_train_mode(self):
        model = self.build(classes=2)
        model.freeze_encoder()
        model.train()
        norms = [m for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        assert not any(m.training for m in norms)
        before = copy.deepcopy(model.encoder.state_dict())
        model(self.image(batch=2)).mean().backward()
        assert all(torch.equal(before[k], v) for k, v in model.encoder.state_dict().items())
        assert all(p.grad is None for p in model.encoder.parameters())
        assert all(p.grad is not None for p in model.decoder.parameters())

        model.unfreeze_encoder()
        model.train()
        assert all(m.training for m in norms)
        assert all(p.requires_grad for p in model.encoder.parameters())

    def test_frozen_levels_are_all_that_the_finer_maps_need(self):
        model = self.build(classes=2)
        model.freeze_encoder(2)
        model.train()
        before = copy.deepcopy(model.encoder.state_dict())
        x = self.image(batch=2)
        model(x).mean().backward()
        frozen = {k for k, p in model.encoder.named_parameters() if not p.requires_grad}
        trained = {k for k, p in model.encoder.named_parameters() if p.grad is not None}
        assert frozen and trained and not frozen & trained
        for norm in (m for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)):
            assert norm.training == norm.weight.requires_grad
        # Moving what is left moves the maps above level 2 and no other.
        with torch.no_grad():
            model.eval()
            old = model.encoder(x)
            for key, parameter in model.encoder.named_parameters():
                if key not in frozen:
                    parameter.mul_(1.5)
            new = model.encoder(x)
        same = [torch.equal(a, b) for a, b in zip(old, new, strict=True)]
        assert same == [True] * 3 + [False] * (len(old) - 3)
        saved = model.encoder.state_dict()
        assert all(torch.equal(before[k], saved[k]) for k in frozen)

        copied = copy.deepcopy(model).train()
        assert any(not m.training for m in copied.encoder.modules())
        model.unfreeze_encoder()
        model.train()
        assert all(m.training for m in model.encoder.modules())
        assert all(p.requires_grad for p in model.encoder.parameters())
        with pytest.raises(InputError, match="level 9"):
            model.freeze_encoder(9)

    def test_channels_last_gives_the_same(self):
        model = self.build(classes=3).eval()
        x = self.image(67, 71, batch=2)
        with torch.no_grad():
            expected = model(x)
            actual = model.to(memory_format=torch.channels_last)(
                x.to(memory_format=torch.channels_last)
            )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    def test_deepcopy_and_pickle(self):
        model = self.build(classes=3).eval()
        x = self.image()
        with torch.no_grad():
            expected = model(x)
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(other(x), expected)
                assert other.preprocess_cfg == model.preprocess_cfg
                assert other.config["classes"] == 3
                other.segmentation_head.classifier.bias.data.add_(1.0)
                assert torch.equal(model(x), expected)  # nothing is shared

    @pytest.mark.slow
    def test_compile_fullgraph_dynamic(self):
        self.check_compile()

    @pytest.mark.slow
    def test_strict_export(self):
        self.check_export()

    def check_compile(self):
        """Compile once for sizes whose P5 to P7 have odd and even sides; return the graphs made."""
        model = self.build(classes=3, decoder_layers=1).eval()
        torch.compiler.reset()
        counter = CompileCounter()  # the backend "eager", counted
        compiled = torch.compile(model, fullgraph=True, dynamic=self.dynamic, backend=counter)
        with torch.inference_mode():
            for size in [(256, 160), (250, 192), (192, 225)]:
                torch.testing.assert_close(compiled(self.image(*size)), model(self.image(*size)))
        return counter.frame_count

    def check_export(self):
        model = self.build(classes=3, decoder_layers=1).eval()
        assert EffSeg._is_torch_exportable
        sample = self.image()
        with torch.inference_mode():
            expected = model(sample)
        torch.compiler.reset()
        exported = torch.export.export(model, args=(sample,), strict=True)
        with torch.inference_mode():
            torch.testing.assert_close(exported.module()(sample), expected, rtol=1e-5, atol=1e-5)

    def test_script_is_declared_unsupported(self):
        assert EffSeg._is_torch_scriptable is False


@pytest.fixture
def smp_registered(monkeypatch):
    """Return smp with EffSeg registered, until the test ends."""
    import segmentation_models_pytorch as smp

    monkeypatch.setattr(smp, "MODEL_ARCHITECTURES_MAPPING", dict(smp.MODEL_ARCHITECTURES_MAPPING))
    monkeypatch.setattr(smp, "EffSeg", None, raising=False)
    effseg.register_smp()
    return smp


class TestTinyResnet(ModelContract):
    """Small enough to compile and export in every run."""

    encoder_name = "tu-test_resnet.r160_in1k"

    def test_tiny_compiles_to_fewer_graphs_than_sizes(self):
        # One of ours; with several threads PyTorch chooses its convolution for CPUs by the size,
        # which can add a second. A graph a size would be three.
        assert self.check_compile() < 3

    def test_tiny_exports(self):
        self.check_export()


class TestResnet34(ModelContract):
    encoder_name = "resnet34"


class TestTfEfficientnetB0(ModelContract):
    """TensorFlow's SAME padding, which depends on the size.

    Compiled for fixed sizes: timm's symbolic padding takes torch minutes, in smp's models too.
    """

    encoder_name = "tu-tf_efficientnet_b0"
    dynamic = False


class TestEfficientnetB0(ModelContract):
    """Symmetric padding."""

    encoder_name = "tu-efficientnet_b0"


class TestTfEfficientnetLite0(ModelContract):
    encoder_name = "tu-tf_efficientnet_lite0"
    dynamic = False
    small: ClassVar = {
        **ModelContract.small,
        "decoder_fusion": "sum",
        "decoder_activation": "relu6",
    }


class TestConvnextAtto(ModelContract):
    """A transformer-style encoder: no features of stride 2, LayerNorm."""

    encoder_name = "tu-convnext_atto"

    def test_finest_level_must_have_features(self):
        with pytest.raises(effseg.InputError, match="no features at level 1"):
            self.build(decoder_levels=(1, 5))


class TestEveryPartOfTheHead(ModelContract):
    """With all that our per-pixel head adds to the paper's."""

    encoder_name = "tu-test_efficientnet.r160_in1k"
    small: ClassVar = {
        **ModelContract.small,
        "head_context": True,
        "head_pyramid": True,
        "head_refinement": True,
    }


@pytest.mark.parametrize(
    ("activation", "check"),
    [
        ("sigmoid", lambda y: (y >= 0).all() and (y <= 1).all()),
        ("softmax2d", lambda y: torch.allclose(y.sum(1), torch.ones(1, 40, 56), atol=1e-5)),
        ("logsoftmax", lambda y: torch.allclose(y.exp().sum(1), torch.ones(1, 40, 56), atol=1e-5)),
        ("tanh", lambda y: (y.abs() <= 1).all()),
        ("identity", lambda y: y.isfinite().all()),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_output_activation(activation, check):
    torch.manual_seed(0)
    arguments = {"encoder_weights": None, "classes": 4, **ModelContract.small}
    model = EffSeg("tu-test_resnet.r160_in1k", activation=activation, **arguments).eval()
    with torch.no_grad():
        assert check(model(torch.randn(1, 3, 40, 56)))

"""One compiled graph and one exported file for all sizes."""

import pytest
import torch

import effseg

HEAD = {"head_context": True, "head_pyramid": True, "head_refinement": True}
SIZES = [(256, 320), (230, 275), (320, 256), (97, 161)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return effseg.create_model("effseg_lite0", **HEAD).eval()


def image(size, batch=2):
    generator = torch.Generator().manual_seed(size[0])
    return torch.randn(batch, 3, *size, generator=generator)


def check(found, expected):
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.slow
def test_compiled_for_all_sizes(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in SIZES:
            check(compiled(image(size)), model(image(size)))


@pytest.mark.slow
def test_exported_to_onnx_for_all_sizes(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    free = torch.export.Dim.DYNAMIC
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (image((256, 320)),),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes={"x": {0: free, 2: free, 3: free}},
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for size in SIZES:
        for batch in (1, 5):
            x = image(size, batch)
            with torch.no_grad():
                check(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model(x))

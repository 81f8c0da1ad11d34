"""Lists the functions of torch.nn.functional that O1 casts. See `torch_overrides` for the kinds."""

import torch.nn.functional

MODULE = torch.nn.functional

# apex had no prelu and bilinear here: they called torch's, which it patched. Today they are torch's.
# scaled_dot_product_attention came after apex. It multiplies matrices, and refuses a mix of dtypes.
FP16_FUNCS = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc linear
    prelu scaled_dot_product_attention
""".split()  # noqa: SIM905  readable

FP32_FUNCS = """
    interpolate grid_sample softplus softmin log_softmax softmax gelu
    layer_norm group_norm local_response_norm normalize cosine_similarity
    poisson_nll_loss cosine_embedding_loss cross_entropy hinge_embedding_loss kl_div l1_loss mse_loss
    margin_ranking_loss multilabel_margin_loss multilabel_soft_margin_loss multi_margin_loss nll_loss
    binary_cross_entropy_with_logits smooth_l1_loss soft_margin_loss triplet_margin_loss ctc_loss
""".split()  # noqa: SIM905  readable

CASTS = ["bilinear"]

BANNED_FUNCS = ["binary_cross_entropy"]
"""Functions that half precision makes wrong. They raise, unless `amp.init` had allow_banned=True."""

"""transformers: the Perceivers' attention, and their read of an image whole."""

import importlib

import torch

from ...nn import foreign
from ...ops import attention, fourier_cross_attend
from .rule import Rule, dropout_note, own_dropout_note, watched

_MODULE = "transformers.models.perceiver.modeling_perceiver"


def _attention(plain):
    def forward(self, hidden_states, attention_mask=None, inputs=None, inputs_mask=None, output_attentions=False):
        x, mask = self.layernorm1(hidden_states), attention_mask if inputs is None else inputs_mask
        q = self.query(x)
        # The lowest float16 is not so low that float32 sums of scores and it are all alike, as those of a query without keys are there.
        if (output_attentions or x.device.type not in ("cpu", "cuda") or (self.dropout.training and self.dropout.p > 0)
                or (mask is not None and (q.dtype is torch.float16 or not mask.is_floating_point()))):
            return plain(self, hidden_states, attention_mask, inputs, inputs_mask, output_attentions)
        source = self.layernorm2(inputs)
        source = x if source is None else source
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, self.key(source), self.value(source)))
        if mask is not None and mask.dtype != q.dtype:
            # Under autocast: the lowest float32, which hides a key, would be -inf.
            mask = mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
        return (attention(q, k, v, bias=mask).transpose(1, 2).flatten(2),)

    return forward


def _model(plain):
    package = importlib.import_module(_MODULE)

    def forward(self, inputs, attention_mask=None, subsampled_output_points=None, output_attentions=None, output_hidden_states=None,
                interpolate_pos_encoding=False, return_dict=None, **rest):
        wanted = lambda option, name: getattr(self.config, name) if option is None else option
        read, positions = self.encoder.cross_attention, self.input_preprocessor.position_embeddings
        attend, out = read.attention.self, read.attention.output.dense
        if (attention_mask is not None or subsampled_output_points is not None or wanted(output_attentions, "output_attentions")
                or wanted(output_hidden_states, "output_hidden_states") or inputs.dim() != positions.num_dimensions + 2
                or inputs.device.type not in ("cpu", "cuda") or (attend.dropout.training and attend.dropout.p > 0)
                or watched(self.encoder, read, *read.attention.modules(), *self.input_preprocessor.modules())):
            return plain(self, inputs, attention_mask, subsampled_output_points, output_attentions, output_hidden_states,
                         interpolate_pos_encoding, return_dict, **rest)
        x, image = self.embeddings(batch_size=inputs.shape[0]), inputs if inputs.dim() == 4 else inputs.transpose(1, 2)
        x = fourier_cross_attend(
            x, image, attend.query.weight, attend.key.weight, attend.value.weight, out.weight, bands=positions.num_bands,
            max_freq=tuple(map(float, positions.max_resolution)), heads=attend.num_heads, q_bias=attend.query.bias,
            k_bias=attend.key.bias, v_bias=attend.value.bias, out_bias=out.bias,
            target_norm=(attend.layernorm1.weight, attend.layernorm1.bias),
            source_norm=(attend.layernorm2.weight, attend.layernorm2.bias), eps=attend.layernorm1.eps,
            residual=read.attention.use_query_residual)
        x = package.apply_chunking_to_forward(read.feed_forward_chunk, read.chunk_size_feed_forward, read.seq_len_dim, x) + x
        for layer in [*self.encoder.self_attends] * self.encoder.config.num_blocks:
            x = layer(x)[0]
        logits = None
        if self.decoder:
            logits = self.decoder(self.decoder.decoder_query(inputs), z=x).logits  # of the inputs it takes their number alone
            if self.output_postprocessor:
                logits = self.output_postprocessor(logits, modality_sizes=None)
        result = package.PerceiverModelOutput(logits=logits, last_hidden_state=x)
        return result if wanted(return_dict, "return_dict") else result.to_tuple()

    return forward


def _no_grid(m):
    """A reason against `_model`, or None."""
    if why := foreign.why_no_grid(m.input_preprocessor):
        return why
    attend = m.encoder.cross_attention.attention.self
    if attend.layernorm1.eps != attend.layernorm2.eps:
        return f"its read's norms have different eps, {attend.layernorm1.eps} and {attend.layernorm2.eps}"
    kind = f"{type(m.decoder).__module__}.{type(m.decoder).__qualname__}"
    if m.decoder is None:
        return None
    if kind not in (f"{_MODULE}.PerceiverClassificationDecoder", f"{_MODULE}.PerceiverBasicDecoder"):
        return f"its decoder is a {kind}, which may want the input's features"
    decoder = getattr(m.decoder, "decoder", m.decoder)
    if decoder.position_encoding_type != "trainable" or decoder.concat_preprocessed_input:
        return "its decoder's queries are made from the input"
    return None


def _one_width(m):
    if m.qk_channels != m.v_channels:
        return f"queries and keys of {m.qk_channels} channels, values of {m.v_channels}: attention takes one width"
    return None


RULES = (
    Rule(_MODULE, "PerceiverSelfAttention", _attention, refuse=_one_width, note=own_dropout_note,
         inputs=frozenset("hidden_states attention_mask inputs inputs_mask output_attentions".split()),
         options=frozenset("config is_cross_attention qk_channels v_channels num_heads q_dim kv_dim".split())),
    Rule(_MODULE, "PerceiverModel", _model, refuse=_no_grid,
         note=lambda m: dropout_note(m.encoder.cross_attention.attention.self.dropout),
         inputs=frozenset("inputs attention_mask subsampled_output_points output_attentions output_hidden_states interpolate_pos_encoding "
                          "return_dict kwargs".split()),
         options=frozenset("config decoder input_preprocessor output_postprocessor".split())),
)

"""A small module with the structure of mPLUG-Owl2, whose code transformers does not have.

Names of modules and the keywords of `forward` are the published ones (X-PLUG/mPLUG-Owl, mPLUG-Owl2);
positions of the abstractor's queries and keys are left out, and prompts are one at a time, so the mask of
padding is ignored.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

IMAGE_TOKEN_INDEX = -200


class MPLUGOwl2Config(LlamaConfig):
    model_type = "mplug_owl2"
    visual_config: dict | None = None


def attend(q, k, v, heads, mask=0.0):
    """Softmax attention with the heads side by side in the last dimension."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


# -- the vision tower ----------------------------------------------------------------------------


class MplugOwlVisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden_states, output_attentions=False):
        mixed = self.query_key_value(hidden_states).unflatten(-1, (self.heads, 3, -1))
        q, k, v = (x.flatten(2) for x in mixed.unbind(-2))
        return self.dense(attend(q, k, v, self.heads)), None


class MplugOwlMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        hidden_states = self.fc1(hidden_states)
        return self.fc2(hidden_states * torch.sigmoid(1.702 * hidden_states))


class MplugOwlVisionEncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = MplugOwlVisionAttention(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = MplugOwlMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask, output_attentions=False):
        paid, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states))
        hidden_states = hidden_states + paid
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class MplugOwlVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.patch_size = config.hidden_size, config.patch_size
        many = (config.image_size // self.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_cls_token else None
        self.patch_embed = nn.Conv2d(3, width, self.patch_size, self.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(1, many + config.use_cls_token, width))
        self.pre_layernorm = nn.LayerNorm(width)

    def forward(self, pixel_values):
        patches = self.patch_embed(pixel_values).flatten(2).mT
        if self.cls_token is not None:
            patches = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        return self.pre_layernorm(patches + self.position_embedding)


class MplugOwlVisionModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = MplugOwlVisionEmbeddings(config)
        self.encoder = layers(MplugOwlVisionEncoderLayer, config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values):
        hidden_states = self.embeddings(pixel_values)
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states, None, output_attentions=False)[0]
        return BaseModelOutput(self.post_layernorm(hidden_states))


def layers(kind, config):
    encoder = nn.Module()
    encoder.layers = nn.ModuleList(kind(config) for _ in range(config.num_hidden_layers))
    return encoder


# -- the abstractor ------------------------------------------------------------------------------


class MplugOwlVisualAbstractorMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size)

    def forward(self, hidden_states):
        gated = nn.functional.silu(self.w1(hidden_states)) * self.w3(hidden_states)
        return self.w2(self.ffn_ln(gated))


class MplugOwlVisualAbstractorMultiHeadAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(config.encoder_hidden_size, width)
        self.value = nn.Linear(config.encoder_hidden_size, width)

    def forward(self, hidden_states, seen):
        return attend(self.query(hidden_states), self.key(seen), self.value(seen), self.heads)


class MplugOwlVisualAbstractorCrossOutput(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.encoder_hidden_size
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MplugOwlVisualAbstractorMLP(config)

    def forward(self, hidden_states, input_tensor):
        input_tensor = input_tensor + self.out_proj(hidden_states)
        return input_tensor + self.mlp(self.norm2(input_tensor))


class MplugOwlVisualAbstractorAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = MplugOwlVisualAbstractorMultiHeadAttention(config)
        self.output = MplugOwlVisualAbstractorCrossOutput(config)
        self.norm1 = nn.LayerNorm(config.encoder_hidden_size)
        self.normk = nn.LayerNorm(config.encoder_hidden_size)

    def forward(self, hidden_states, encoder_hidden_states):
        hidden_states = self.norm1(hidden_states)
        seen = torch.cat([hidden_states, self.normk(encoder_hidden_states)], 1)
        return (self.output(self.attention(hidden_states, seen), hidden_states),)


class MplugOwlVisualAbstractorLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.crossattention = MplugOwlVisualAbstractorAttention(config)

    def forward(self, hidden_states, encoder_hidden_states):
        return (self.crossattention(hidden_states, encoder_hidden_states)[0],)


class MplugOwlVisualAbstractorModel(nn.Module):
    def __init__(self, config, language_hidden_size):
        super().__init__()
        self.encoder = layers(MplugOwlVisualAbstractorLayer, config)
        self.visual_fc = nn.Linear(config.hidden_size, language_hidden_size)
        self.query_embeds = nn.Parameter(torch.empty(1, config.num_learnable_queries, config.hidden_size))
        self.vit_eos = nn.Parameter(torch.empty(1, 1, language_hidden_size))

    def forward(self, encoder_hidden_states):
        many = len(encoder_hidden_states)
        hidden_states = self.query_embeds.repeat(many, 1, 1)
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states, encoder_hidden_states)[0]
        end = self.vit_eos.repeat(many, 1, 1)
        return BaseModelOutput(torch.cat([self.visual_fc(hidden_states), end], 1))


# -- the decoder ---------------------------------------------------------------------------------


class MultiwayNetwork(nn.Module):
    """A module for text (0) and one for the image (1)."""

    def __init__(self, make):
        super().__init__()
        self.multiway = nn.ModuleList(make() for _ in range(2))

    def forward(self, hidden_states, multiway_indices):
        text, image = (module(hidden_states) for module in self.multiway)
        return torch.where(multiway_indices[..., None] == 1, image, text)


class LlamaAttention(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        width, self.heads, self.number = config.hidden_size, config.num_attention_heads, number
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = MultiwayNetwork(lambda: nn.Linear(width, width, bias=False))
        self.v_proj = MultiwayNetwork(lambda: nn.Linear(width, width, bias=False))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states, modality_indicators, attention_mask, rotary, past_key_values):
        q = self.q_proj(hidden_states)
        k = self.k_proj(hidden_states, modality_indicators)
        v = self.v_proj(hidden_states, modality_indicators)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.number)
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        return self.o_proj(attend(q, k, v, self.heads, attention_mask)), None, past_key_values


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.self_attn = LlamaAttention(config, number)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = MultiwayNetwork(lambda: LlamaRMSNorm(config.hidden_size))
        self.post_attention_layernorm = MultiwayNetwork(lambda: LlamaRMSNorm(config.hidden_size))

    def forward(self, hidden_states, modality_indicators=None, **more):
        normed = self.input_layernorm(hidden_states, modality_indicators)
        paid, *_ = self.self_attn(normed, modality_indicators, **more)
        hidden_states = hidden_states + paid
        normed = self.post_attention_layernorm(hidden_states, modality_indicators)
        return (hidden_states + self.mlp(normed),)


class MPLUGOwl2LlamaModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        visual, width = config.visual_config, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(width)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.vision_model = MplugOwlVisionModel(SimpleNamespace(**visual["visual_model"]))
        self.visual_abstractor = MplugOwlVisualAbstractorModel(
            SimpleNamespace(**visual["visual_abstractor"]), width
        )

    def forward(self, inputs_embeds, modality_indicators, past_key_values):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        at = torch.arange(past, past + inputs_embeds.shape[1])
        mask = torch.where(torch.arange(int(at[-1]) + 1) <= at[:, None], 0.0, -1e9)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                modality_indicators=modality_indicators,
                attention_mask=mask,
                rotary=self.rotary_emb(inputs_embeds, at[None]),
                past_key_values=past_key_values,
            )[0]
        return self.norm(hidden_states)


class MPLUGOwl2LlamaForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MPLUGOwl2Config

    def __init__(self, config):
        super().__init__(config)
        self.model = MPLUGOwl2LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def merged(self, input_ids, images):
        """Embeddings of one prompt with the image's in the place of its token, and which are which."""
        seen = self.model.visual_abstractor(self.model.vision_model(images).last_hidden_state)
        (at,) = (input_ids[0] == IMAGE_TOKEN_INDEX).nonzero()[0].tolist()
        text = self.model.embed_tokens(input_ids.clamp(min=0))
        image = seen.last_hidden_state
        ways = [torch.zeros(at), torch.ones(image.shape[1]), torch.zeros(text.shape[1] - at - 1)]
        return torch.cat([text[:, :at], image, text[:, at + 1 :]], 1), torch.cat(ways)[None].long()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        images=None,
        return_dict=None,
    ):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if images is None or input_ids.shape[1] == 1:
            embeds, ways = self.model.embed_tokens(input_ids), torch.zeros_like(input_ids)
        else:
            embeds, ways = self.merged(input_ids, images)
        hidden_states = self.model(embeds, ways, past_key_values)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states), past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        begun = past_key_values is not None and past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, -1:] if begun else input_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
            "images": kwargs.get("images"),
        }

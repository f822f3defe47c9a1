//! The layers in f64: one sequence, loops, no chunks.

use burn::nn::Linear;
use gla_burn::{FeatureMap, GatedLinearAttention, Mixer, ShortConv, SoftmaxAttention};

use crate::values;

pub type Rows = Vec<Vec<f64>>;

fn project(linear: &Linear, rows: &Rows) -> Rows {
    let [_, out] = linear.weight.dims();
    let weight = values(linear.weight.val());
    let bias = linear.bias.as_ref().map(|bias| values(bias.val()));
    let output = |row: &[f64], o: usize| {
        let terms = row.iter().enumerate().map(|(i, x)| x * weight[i * out + o]);
        terms.sum::<f64>() + bias.as_ref().map_or(0.0, |bias| bias[o])
    };
    rows.iter().map(|row| (0..out).map(|o| output(row, o)).collect()).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn convolve(conv: &Option<ShortConv>, rows: Rows) -> Rows {
    let Some(conv) = conv else { return rows };
    let [channels, _, width] = conv.weight.dims();
    let weight = values(conv.weight.val());
    let at = |t: usize, d: usize| {
        let taps = (0..width).filter(|j| t + j + 1 >= width);
        silu(taps.map(|j| weight[d * width + j] * rows[t + j + 1 - width][d]).sum())
    };
    (0..rows.len()).map(|t| (0..channels).map(|d| at(t, d)).collect()).collect()
}

/// The output of a mixer for one sequence `x`, `[T, hidden_size]`.
pub fn naive(mixer: &Mixer, x: &Rows) -> Rows {
    match mixer {
        Mixer::Gla(layer) => gla(layer, x),
        Mixer::SoftmaxAttention(layer) => softmax_attention(layer, x),
    }
}

/// Turns the heads of width `dim` in each row by its index.
fn rotate(rows: &mut Rows, dim: usize, theta: f64) {
    for (t, row) in rows.iter_mut().enumerate() {
        for head in row.chunks_mut(dim) {
            for i in 0..dim / 2 {
                let angle = t as f64 * theta.powf(-2.0 * i as f64 / dim as f64);
                let (x, y) = (head[i], head[i + dim / 2]);
                head[i] = x * angle.cos() - y * angle.sin();
                head[i + dim / 2] = x * angle.sin() + y * angle.cos();
            }
        }
    }
}

fn softmax_attention(layer: &SoftmaxAttention, x: &Rows) -> Rows {
    let (heads, dim) = (layer.num_heads, layer.head_dim);
    let groups = heads / layer.num_kv_heads;
    let [mut q, mut k, v] = [&layer.q_proj, &layer.k_proj, &layer.v_proj].map(|p| project(p, x));
    rotate(&mut q, dim, layer.rotary.theta);
    rotate(&mut k, dim, layer.rotary.theta);
    let mut mixed = vec![vec![0.0; heads * dim]; x.len()];
    for t in 0..x.len() {
        let first = (t + 1).saturating_sub(layer.window_size.unwrap_or(usize::MAX));
        for h in 0..heads {
            let (own, kv) = (h * dim, h / groups * dim);
            let score = |s: usize| -> f64 {
                let product: f64 = (0..dim).map(|i| q[t][own + i] * k[s][kv + i]).sum();
                (product / (dim as f64).sqrt()).exp()
            };
            let sum: f64 = (first..=t).map(score).sum();
            for i in 0..dim {
                mixed[t][own + i] = (first..=t).map(|s| score(s) * v[s][kv + i]).sum::<f64>() / sum;
            }
        }
    }
    project(&layer.o_proj, &mixed)
}

fn gla(layer: &GatedLinearAttention, x: &Rows) -> Rows {
    let (heads, groups) = (layer.num_heads, layer.num_heads / layer.num_kv_heads);
    let (k_dim, v_dim) = (layer.head_k_dim, layer.head_v_dim);
    let map = |x: f64| match layer.feature_map {
        None => x,
        Some(FeatureMap::Silu) => silu(x),
        Some(FeatureMap::SqRelu) => x.max(0.0).powi(2),
        Some(map) => panic!("no naive {map:?}"),
    };
    let q = convolve(&layer.q_conv1d, project(&layer.q_proj, x));
    let k = convolve(&layer.k_conv1d, project(&layer.k_proj, x));
    let v = convolve(&layer.v_conv1d, project(&layer.v_proj, x));
    let logits = project(&layer.gk_proj[1], &project(&layer.gk_proj[0], x));
    let gate = layer.g_proj.as_ref().map(|proj| project(proj, x));
    let norm = layer.g_norm_swish_gate.as_ref().or(layer.g_norm.as_ref()).unwrap();
    let weight = values(norm.weight.val());

    let mut state = vec![vec![vec![0.0; v_dim]; k_dim]; heads];
    let mut mixed = vec![vec![0.0; heads * v_dim]; x.len()];
    for t in 0..x.len() {
        for h in 0..heads {
            let kv = h / groups;
            let o = &mut mixed[t][h * v_dim..][..v_dim];
            for i in 0..k_dim {
                let logit: f64 = logits[t][kv * k_dim + i];
                let g = -(-logit).exp().ln_1p() / layer.gate_logit_normalizer;
                let g = g.max(layer.clamp_min.unwrap_or(f64::NEG_INFINITY));
                for j in 0..v_dim {
                    let s = &mut state[h][i][j];
                    *s = g.exp() * *s + map(k[t][kv * k_dim + i]) * v[t][kv * v_dim + j];
                    o[j] += *s * map(q[t][h * k_dim + i]) / (k_dim as f64).sqrt();
                }
            }
            let mean = o.iter().map(|o| o * o).sum::<f64>() / v_dim as f64;
            for j in 0..v_dim {
                let gate = gate.as_ref().map_or(1.0, |gate| silu(gate[t][h * v_dim + j]));
                o[j] *= weight[j] * gate / (mean + norm.epsilon).sqrt();
            }
        }
    }
    project(&layer.o_proj, &mixed)
}

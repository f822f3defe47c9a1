//! The layers and the model in f64: one sequence, loops, no chunks.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::Tensor;
use gla_burn::{
    FeatureMap, GateProjection, GatedLinearAttention, GlaTransformer, HeadFeatureMap, Hgrn2, Mamba,
    Mamba2, Mixer, RmsNorm, Rotary, ShortConv, SoftmaxAttention,
};

use crate::values;

pub type Rows = Vec<Vec<f64>>;

fn param<const D: usize>(param: &Param<Tensor<D>>) -> Vec<f64> {
    values(param.val())
}

fn rows<const D: usize>(matrix: &Param<Tensor<D>>) -> Rows {
    let width = matrix.dims()[D - 1];
    param(matrix).chunks(width).map(<[f64]>::to_vec).collect()
}

fn project(linear: &Linear, x: &Rows) -> Rows {
    let weight = rows(&linear.weight);
    let [_, out] = linear.weight.dims();
    let bias = linear.bias.as_ref().map_or(vec![0.0; out], param);
    let output = |x: &Vec<f64>, o: usize| {
        bias[o] + x.iter().zip(&weight).map(|(x, w)| x * w[o]).sum::<f64>()
    };
    x.iter().map(|x| (0..out).map(|o| output(x, o)).collect()).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

fn log_sigmoid(x: f64) -> f64 {
    -(-x).exp().ln_1p()
}

fn softplus(x: f64) -> f64 {
    x.exp().ln_1p()
}

fn each(rows: Rows, f: impl Fn(f64) -> f64 + Copy) -> Rows {
    rows.into_iter().map(|row| row.into_iter().map(f).collect()).collect()
}

fn combine(x: Rows, y: Rows, f: impl Fn(f64, f64) -> f64 + Copy) -> Rows {
    let row = |(x, y): (Vec<f64>, Vec<f64>)| x.into_iter().zip(y).map(|(x, y)| f(x, y)).collect();
    x.into_iter().zip(y).map(row).collect()
}

fn columns(x: &Rows, from: usize, to: usize) -> Rows {
    x.iter().map(|row| row[from..to].to_vec()).collect()
}

fn convolve(conv: &ShortConv, x: Rows) -> Rows {
    let [channels, _, width] = conv.weight.dims();
    let weight = rows(&conv.weight);
    let bias = conv.bias.as_ref().map_or(vec![0.0; channels], param);
    let at = |t: usize, d: usize| {
        let taps = (0..width).filter(|j| t + j + 1 >= width);
        bias[d] + taps.map(|j| weight[d][j] * x[t + j + 1 - width][d]).sum::<f64>()
    };
    let y = (0..x.len()).map(|t| (0..channels).map(|d| at(t, d)).collect()).collect();
    if conv.swish { each(y, silu) } else { y }
}

fn maybe_convolve(conv: &Option<ShortConv>, x: Rows) -> Rows {
    match conv {
        Some(conv) => convolve(conv, x),
        None => x,
    }
}

/// Normalises pieces of the rows, as wide as the weight.
fn normalize(norm: &RmsNorm, x: Rows) -> Rows {
    let weight = param(&norm.weight);
    let piece = |x: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let rms = (mean + norm.epsilon).sqrt();
        x.iter().zip(&weight).map(|(x, w)| x / rms * w).collect()
    };
    x.iter().map(|row| row.chunks(weight.len()).flat_map(piece).collect()).collect()
}

/// Turns the heads of width `dim` in each row by its index.
fn rotate(rows: &mut Rows, dim: usize, Rotary { theta }: Rotary) {
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

/// The recurrence, for `k` and `v` of fewer heads than `q` too. The log gate is a function of time,
/// key head and key channel.
fn recur(
    [q, k, v]: [&Rows; 3],
    [heads, kv_heads]: [usize; 2],
    scale: Option<f64>,
    gate: impl Fn(usize, usize, usize) -> f64,
) -> Rows {
    let (k_dim, v_dim) = (k[0].len() / kv_heads, v[0].len() / kv_heads);
    let scale = scale.unwrap_or((k_dim as f64).powf(-0.5));
    let mut state = vec![vec![vec![0.0; v_dim]; k_dim]; heads];
    let mut output = vec![vec![0.0; heads * v_dim]; q.len()];
    for t in 0..q.len() {
        for h in 0..heads {
            let kv = h * kv_heads / heads;
            for i in 0..k_dim {
                let decay = gate(t, kv, i).exp();
                for j in 0..v_dim {
                    let s = &mut state[h][i][j];
                    *s = decay * *s + k[t][kv * k_dim + i] * v[t][kv * v_dim + j];
                    output[t][h * v_dim + j] += scale * *s * q[t][h * k_dim + i];
                }
            }
        }
    }
    output
}

/// The output of a mixer for one sequence `x`, `[T, hidden_size]`.
pub fn naive(mixer: &Mixer, x: &Rows, lower_bound: Option<&Vec<f64>>) -> Rows {
    match mixer {
        Mixer::Gla(layer) => gla(layer, x),
        Mixer::Hgrn2(layer) => hgrn2(layer, x, lower_bound),
        Mixer::Mamba2(layer) => mamba2(layer, x),
        Mixer::Mamba(layer) => mamba(layer, x),
        Mixer::SoftmaxAttention(layer) => softmax_attention(layer, x),
    }
}

/// Features of heads, one a row.
fn of_heads<'a>(map: &HeadFeatureMap, heads: impl Iterator<Item = &'a [f64]>) -> Rows {
    let heads: Rows = heads.map(Vec::from).collect();
    match map {
        HeadFeatureMap::ElementwiseProduct(map) => {
            combine(project(&map.layer1, &heads), project(&map.layer2, &heads), |x, y| x * y)
        }
        HeadFeatureMap::Hedgehog(map) => {
            let feature = |z: &Vec<f64>| {
                let both = z.iter().copied().chain(z.iter().map(|z| -z));
                let exp: Vec<f64> = both.map(|z| (2.0 * z).exp()).collect();
                let sum: f64 = exp.iter().sum();
                exp.into_iter().map(|exp| exp / sum).collect()
            };
            project(&map.layer, &heads).iter().map(feature).collect()
        }
        HeadFeatureMap::T2r(map) => each(project(&map.layer, &heads), |x| x.max(0.0)),
        HeadFeatureMap::Dpfp(map) => {
            let features = |x: &Vec<f64>| {
                let n = 2 * x.len();
                let r =
                    |i: usize| if i < x.len() { x[i].max(0.0) } else { (-x[i - x.len()]).max(0.0) };
                let feature = |f: usize| r(f % n) * r((f % n + n - (f / n + 1) % n) % n);
                (0..map.nu * n).map(feature).collect()
            };
            heads.iter().map(features).collect()
        }
    }
}

fn gla(layer: &GatedLinearAttention, x: &Rows) -> Rows {
    let (heads, kv_heads) = (layer.num_heads, layer.num_kv_heads);
    let (mut k_dim, v_dim) = (layer.head_k_dim, layer.head_v_dim);
    let map = |x: f64| match layer.feature_map {
        None => x,
        Some(FeatureMap::Silu) => silu(x),
        Some(FeatureMap::SqRelu) => x.max(0.0).powi(2),
        Some(FeatureMap::Relu) => x.max(0.0),
        Some(FeatureMap::Elu) => {
            if x > 0.0 {
                x + 1.0
            } else {
                x.exp()
            }
        }
        Some(map) => panic!("no naive {map:?}"),
    };
    let mut q = each(maybe_convolve(&layer.q_conv1d, project(&layer.q_proj, x)), map);
    let mut k = each(maybe_convolve(&layer.k_conv1d, project(&layer.k_proj, x)), map);
    let v = maybe_convolve(&layer.v_conv1d, project(&layer.v_proj, x));
    for (x, map) in [(&mut q, &layer.feature_map_q), (&mut k, &layer.feature_map_k)] {
        if let Some(map) = map {
            let heads = x[0].len() / layer.head_k_dim;
            let features = of_heads(map, x.concat().chunks(layer.head_k_dim));
            k_dim = features[0].len();
            *x = features.chunks(heads).map(<[Vec<f64>]>::concat).collect();
        }
        if let Some(rotary) = layer.rotary {
            rotate(x, k_dim, rotary);
        }
    }

    let log_gate = |logit: f64| {
        let g = log_sigmoid(logit) / layer.gate_logit_normalizer;
        g.max(layer.clamp_min.unwrap_or(f64::NEG_INFINITY))
    };
    let operands = [&q, &k, &v];
    let recur =
        |gate: &dyn Fn(usize, usize, usize) -> f64| recur(operands, [heads, kv_heads], None, gate);
    let mut mixed = match (&layer.gk_proj, &layer.fixed_gate) {
        (Some(GateProjection::Vector([down, up])), _) => {
            let logits = project(up, &project(down, x));
            recur(&|t, h, i| log_gate(logits[t][h * k_dim + i]))
        }
        (Some(GateProjection::Scalar(proj)), _) => {
            let logits = project(proj, x);
            recur(&|t, h, _| log_gate(logits[t][h]))
        }
        (None, Some(gate)) => {
            let gate = values(gate.clone());
            // of query heads, and one key head may serve several: each has a state of its own
            assert_eq!(heads, kv_heads, "no naive grouped retention");
            recur(&|_, h, _| gate[h])
        }
        (None, None) => recur(&|_, _, _| 0.0),
    };
    if layer.normalize {
        for t in 0..x.len() {
            for h in 0..heads {
                let kv = h * kv_heads / heads;
                let weight = |s: usize| -> f64 {
                    (0..k_dim).map(|i| q[t][h * k_dim + i] * k[s][kv * k_dim + i]).sum()
                };
                let sum = (0..=t).map(weight).sum::<f64>() / (k_dim as f64).sqrt() + 1e-10;
                mixed[t][h * v_dim..][..v_dim].iter_mut().for_each(|o| *o /= sum);
            }
        }
    }
    let norm = layer.g_norm_swish_gate.as_ref().or(layer.g_norm.as_ref());
    let mut mixed = normalize(norm.or(layer.norm.as_ref()).unwrap(), mixed);
    if let Some(gate) = &layer.g_proj {
        mixed = combine(mixed, each(project(gate, x), silu), |x, y| x * y);
    }
    project(&layer.o_proj, &mixed)
}

fn hgrn2(layer: &Hgrn2, x: &Rows, lower_bound: Option<&Vec<f64>>) -> Rows {
    let q = each(maybe_convolve(&layer.q_conv1d, project(&layer.q_proj, x)), silu);
    let f = maybe_convolve(&layer.f_conv1d, project(&layer.f_proj, x));
    let v = maybe_convolve(&layer.i_conv1d, project(&layer.i_proj, x));
    let width = f[0].len();
    let bound = |i: usize| lower_bound.map_or(0.0, |bound| bound[i]);
    let alpha = |f: f64, i: usize| bound(i) + (1.0 - bound(i)) * sigmoid(f);
    let alpha: Rows = f.iter().map(|f| (0..width).map(|i| alpha(f[i], i)).collect()).collect();
    let k = each(alpha.clone(), |alpha| 1.0 - alpha);
    let k_dim = width / layer.num_heads;
    let gate = |t: usize, h: usize, i: usize| alpha[t][h * k_dim + i].ln();
    let mixed = recur([&q, &k, &v], [layer.num_heads; 2], None, gate);
    project(&layer.o_proj, &normalize(&layer.g_norm, mixed))
}

fn mamba2(layer: &Mamba2, x: &Rows) -> Rows {
    let [bias, a_log, skip] = [&layer.dt_bias, &layer.A_log, &layer.D].map(param);
    let (heads, dim, state) = (bias.len(), layer.head_dim, layer.state_size);
    let (inner, shared) = (heads * dim, layer.n_groups * state);
    let projected = project(&layer.in_proj, x);
    let z = columns(&projected, 0, inner);
    let u = convolve(&layer.conv1d, columns(&projected, inner, 2 * inner + 2 * shared));
    let dt = |t: usize, h: usize| softplus(projected[t][2 * inner + 2 * shared + h] + bias[h]);
    let group = |h: usize| h * layer.n_groups / heads * state;
    let of_heads = |first: usize| -> Rows {
        let row = |u: &Vec<f64>| {
            (0..heads).flat_map(|h| u[first + group(h)..][..state].to_vec()).collect()
        };
        u.iter().map(row).collect()
    };
    let (k, q) = (of_heads(inner), of_heads(inner + shared));
    let v: Rows =
        (0..x.len()).map(|t| (0..inner).map(|i| dt(t, i / dim) * u[t][i]).collect()).collect();
    let gate = |t: usize, h: usize, _| -a_log[h].exp() * dt(t, h);
    let mut mixed = recur([&q, &k, &v], [heads; 2], Some(1.0), gate);
    for t in 0..x.len() {
        for i in 0..inner {
            mixed[t][i] = (mixed[t][i] + skip[i / dim] * u[t][i]) * silu(z[t][i]);
        }
    }
    project(&layer.out_proj, &normalize(&layer.norm, mixed))
}

fn mamba(layer: &Mamba, x: &Rows) -> Rows {
    let (a_log, skip) = (rows(&layer.A_log), param(&layer.D));
    let (inner, state) = (skip.len(), a_log[0].len());
    let projected = project(&layer.in_proj, x);
    let u = convolve(&layer.conv1d, columns(&projected, 0, inner));
    let z = columns(&projected, inner, 2 * inner);
    let selected = project(&layer.x_proj, &u);
    let rank = selected[0].len() - 2 * state;
    let dt = each(project(&layer.dt_proj, &columns(&selected, 0, rank)), softplus);
    let mut mixed = Rows::new();
    let mut memory = vec![vec![0.0; state]; inner];
    for t in 0..x.len() {
        let (b, c) = (&selected[t][rank..], &selected[t][rank + state..]);
        let mut output = Vec::new();
        for d in 0..inner {
            let mut sum = skip[d] * u[t][d];
            for n in 0..state {
                let decay = (-a_log[d][n].exp() * dt[t][d]).exp();
                memory[d][n] = decay * memory[d][n] + dt[t][d] * b[n] * u[t][d];
                sum += c[n] * memory[d][n];
            }
            output.push(sum * silu(z[t][d]));
        }
        mixed.push(output);
    }
    project(&layer.out_proj, &mixed)
}

fn softmax_attention(layer: &SoftmaxAttention, x: &Rows) -> Rows {
    let (heads, dim) = (layer.num_heads, layer.head_dim);
    let groups = heads / layer.num_kv_heads;
    let [mut q, mut k, v] = [&layer.q_proj, &layer.k_proj, &layer.v_proj].map(|p| project(p, x));
    rotate(&mut q, dim, layer.rotary);
    rotate(&mut k, dim, layer.rotary);
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

/// Logits of a model with an output projection of its own, for one sequence.
pub fn naive_model(model: &GlaTransformer, ids: &[usize]) -> Rows {
    let table = rows(&model.embeddings.weight);
    let mut x: Rows = ids.iter().map(|&id| table[id].clone()).collect();
    let mut bounds = model.lower_bounds.as_ref().map(lower_bounds).into_iter().flatten();
    for block in &model.layers {
        let bound = bounds.next().flatten();
        let mixed = naive(&block.attn, &normalize(&block.attn_norm, x.clone()), bound.as_ref());
        x = combine(x, mixed, |x, y| x + y);
        let normed = normalize(&block.mlp_norm, x.clone());
        let gate = each(project(&block.mlp.gate_proj, &normed), silu);
        let inner = combine(gate, project(&block.mlp.up_proj, &normed), |x, y| x * y);
        x = combine(x, project(&block.mlp.down_proj, &inner), |x, y| x + y);
    }
    project(model.lm_head.as_ref().expect("a projection"), &normalize(&model.norm, x))
}

/// Lower bounds of the layers: none, and then sums of a softmax over the layers from the second on.
fn lower_bounds(logits: &Param<Tensor<2>>) -> Vec<Option<Vec<f64>>> {
    let exp = each(rows(logits), f64::exp);
    let width = exp[0].len();
    let bound = |layer: usize, i: usize| {
        let parts = exp[1..=layer].iter().map(|exp| exp[i]).sum::<f64>();
        parts / exp.iter().map(|exp| exp[i]).sum::<f64>()
    };
    let bounds = |layer: usize| (layer > 0).then(|| (0..width).map(|i| bound(layer, i)).collect());
    (0..exp.len()).map(bounds).collect()
}

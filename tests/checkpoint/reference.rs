//! fla's language models in f64, as loops over the tensors of a checkpoint: GLA, RetNet,
//! hybrids of both with softmax attention, and the Transformer.
//!
//! Written from the description of fla's modules, with nothing of this library: it reads
//! `config.json` and the safetensors files itself.

use std::path::Path;

use serde_json::Value;

use crate::files::{self, Entries};

pub type Rows = Vec<Vec<f64>>;

pub struct Reference {
    config: Value,
    tensors: Entries,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(a: &Rows, b: &Rows) -> Rows {
    let row = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| a + b).collect();
    a.iter().zip(b).map(row).collect()
}

impl Reference {
    pub fn open(folder: &Path) -> Self {
        let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
        Self { config: serde_json::from_str(&config).unwrap(), tensors: files::read_all(folder) }
    }

    fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap() as usize
    }

    fn flag(&self, key: &str) -> bool {
        self.config[key].as_bool().unwrap()
    }

    fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
        let entry = self.tensors.get(name).unwrap_or_else(|| panic!("no {name} in the files"));
        (entry.shape.clone(), entry.values())
    }

    /// `x W^T + b`, with `W` in `[out, in]` and `b` where there is one.
    fn linear(&self, name: &str, x: &Rows) -> Rows {
        let (shape, weight) = self.tensor(&format!("{name}.weight"));
        let bias = format!("{name}.bias");
        let bias = self.tensors.contains_key(&bias).then(|| self.tensor(&bias).1);
        let (outputs, inputs) = (shape[0], shape[1]);
        let output = |x: &Vec<f64>| {
            assert_eq!(x.len(), inputs, "{name}");
            let row = |o: usize| dot(&weight[o * inputs..][..inputs], x);
            (0..outputs).map(|o| row(o) + bias.as_ref().map_or(0.0, |b| b[o])).collect()
        };
        x.iter().map(output).collect()
    }

    fn normed(&self, weight: &[f64], x: &[f64]) -> Vec<f64> {
        let eps = self.config["norm_eps"].as_f64().unwrap();
        let rms = (dot(x, x) / x.len() as f64 + eps).sqrt();
        x.iter().zip(weight).map(|(x, w)| x / rms * w).collect()
    }

    fn norm(&self, name: &str, x: &Rows) -> Rows {
        let (_, weight) = self.tensor(&format!("{name}.weight"));
        x.iter().map(|x| self.normed(&weight, x)).collect()
    }

    /// Causal, one filter per channel, then the swish.
    fn conv(&self, name: &str, x: Rows) -> Rows {
        if !self.flag("use_short_conv") {
            return x;
        }
        let (shape, weight) = self.tensor(&format!("{name}.weight"));
        let (channels, width) = (shape[0], shape[2]);
        let at = |t: usize, d: usize| {
            let mut sum = 0.0;
            for j in 0..width {
                if t + j + 1 >= width {
                    sum += weight[d * width + j] * x[t + j + 1 - width][d];
                }
            }
            silu(sum)
        };
        (0..x.len()).map(|t| (0..channels).map(|d| at(t, d)).collect()).collect()
    }

    fn feature_map(&self, x: f64) -> f64 {
        match self.config["feature_map"].as_str() {
            None => x,
            Some("relu") => x.max(0.0),
            Some("sigmoid") => sigmoid(x),
            Some("logsigmoid") => log_sigmoid(x),
            Some("silu") => silu(x),
            Some("sqrelu") => x.max(0.0).powi(2),
            Some("gelu") => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            }
            Some(map) => panic!("no feature map {map}"),
        }
    }

    fn attention(&self, name: &str, x: &Rows) -> Rows {
        let part = |part: &str| format!("{name}.{part}");
        let heads = self.size("num_heads");
        let kv_heads = self.config["num_kv_heads"].as_u64().map_or(heads, |n| n as usize);
        let projected = |p: &str| {
            let x = self.linear(&part(&format!("{p}_proj")), x);
            self.conv(&part(&format!("{p}_conv1d")), x)
        };
        let map = |x: Rows| -> Rows {
            x.iter().map(|x| x.iter().map(|x| self.feature_map(*x)).collect()).collect()
        };
        let (mut q, mut k, v) = (map(projected("q")), map(projected("k")), projected("v"));
        let (key, value) = (q[0].len() / heads, v[0].len() / kv_heads);
        let retnet = self.config["model_type"] == "retnet";
        if retnet {
            Self::rotate(&mut q, key, 10000.0);
            Self::rotate(&mut k, key, 10000.0);
        }
        let logits = match retnet {
            true => Rows::new(),
            false => self.linear(&part("gk_proj.1"), &self.linear(&part("gk_proj.0"), x)),
        };
        let clamp_min = self.config["clamp_min"].as_f64().unwrap_or(f64::NEG_INFINITY);
        let log_gate = |t: usize, h: usize, i: usize| match retnet {
            true => (1.0 - 0.5_f64.powi(5 + h as i32)).ln(),
            false => {
                let kv = h / (heads / kv_heads);
                (log_sigmoid(logits[t][kv * key + i]) / 16.0).max(clamp_min)
            }
        };
        let gate = self.flag("use_output_gate").then(|| self.linear(&part("g_proj"), x));
        let norm = if gate.is_some() { "g_norm_swish_gate.weight" } else { "g_norm.weight" };
        let (_, norm) = self.tensor(&part(norm));
        let mut state = vec![vec![vec![0.0; value]; key]; heads];
        let mut outputs = Rows::new();
        for t in 0..x.len() {
            let mut output = Vec::new();
            for (h, state) in state.iter_mut().enumerate() {
                let kv = h / (heads / kv_heads);
                let mut o = vec![0.0; value];
                for (i, row) in state.iter_mut().enumerate() {
                    let decay = log_gate(t, h, i).exp();
                    let (k, q) = (k[t][kv * key + i], q[t][h * key + i] / (key as f64).sqrt());
                    for j in 0..value {
                        row[j] = decay * row[j] + k * v[t][kv * value + j];
                        o[j] += q * row[j];
                    }
                }
                let mut o = self.normed(&norm, &o);
                if let Some(gate) = &gate {
                    let gate = &gate[t][h * value..][..value];
                    o.iter_mut().zip(gate).for_each(|(o, g)| *o *= silu(*g));
                }
                output.extend(o);
            }
            outputs.push(output);
        }
        self.linear(&part("o_proj"), &outputs)
    }

    /// The specification of softmax attention in this layer, if it is such a layer.
    fn softmax_layer(&self, layer: usize) -> Option<&Value> {
        if self.config["model_type"] == "transformer" {
            return Some(&self.config);
        }
        let specs = match &self.config["attn"] {
            Value::Array(specs) => specs.as_slice(),
            Value::Null => &[],
            spec => std::slice::from_ref(spec),
        };
        let lists = |spec: &&Value| spec["layers"].as_array().unwrap().contains(&layer.into());
        specs.iter().find(lists)
    }

    /// Turns the halves of each head by the position.
    fn rotate(x: &mut Rows, head_dim: usize, theta: f64) {
        let half = head_dim / 2;
        for (t, row) in x.iter_mut().enumerate() {
            for head in row.chunks_mut(head_dim) {
                for i in 0..half {
                    let angle = t as f64 * theta.powf(-2.0 * i as f64 / head_dim as f64);
                    let (sin, cos) = angle.sin_cos();
                    let (a, b) = (head[i], head[i + half]);
                    (head[i], head[i + half]) = (a * cos - b * sin, a * sin + b * cos);
                }
            }
        }
    }

    fn softmax_attention(&self, name: &str, spec: &Value, x: &Rows) -> Rows {
        let part = |part: &str| self.linear(&format!("{name}.{part}"), x);
        let (mut q, mut k, v) = (part("q_proj"), part("k_proj"), part("v_proj"));
        let heads = spec["num_heads"].as_u64().unwrap() as usize;
        let kv_heads = spec["num_kv_heads"].as_u64().map_or(heads, |n| n as usize);
        let window = spec["window_size"].as_u64().map_or(usize::MAX, |n| n as usize);
        let theta = spec["rope_theta"].as_f64().unwrap();
        let dim = q[0].len() / heads;
        Self::rotate(&mut q, dim, theta);
        Self::rotate(&mut k, dim, theta);

        let mut outputs = vec![vec![0.0; heads * dim]; x.len()];
        for t in 0..x.len() {
            for h in 0..heads {
                let kv = h / (heads / kv_heads) * dim;
                let seen = (t + 1).saturating_sub(window)..t + 1;
                let score = |s: usize| dot(&q[t][h * dim..][..dim], &k[s][kv..][..dim]);
                let weights: Vec<f64> =
                    seen.clone().map(|s| (score(s) / (dim as f64).sqrt()).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for (s, weight) in seen.zip(&weights) {
                    for j in 0..dim {
                        outputs[t][h * dim + j] += weight / sum * v[s][kv + j];
                    }
                }
            }
        }
        self.linear(&format!("{name}.o_proj"), &outputs)
    }

    fn mlp(&self, name: &str, x: &Rows) -> Rows {
        let mut inner = self.linear(&format!("{name}.gate_proj"), x);
        let up = self.linear(&format!("{name}.up_proj"), x);
        for (gate, up) in inner.iter_mut().zip(&up) {
            gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = silu(*gate) * up);
        }
        self.linear(&format!("{name}.down_proj"), &inner)
    }

    /// Logits after each token of one sequence, `[T, vocab]`.
    pub fn logits(&self, ids: &[usize]) -> Rows {
        let (shape, embeddings) = self.tensor("model.embeddings.weight");
        let (vocab, hidden) = (shape[0], shape[1]);
        let mut x: Rows =
            ids.iter().map(|id| embeddings[id * hidden..][..hidden].to_vec()).collect();
        for i in 0..self.size("num_hidden_layers") {
            let layer = format!("model.layers.{i}");
            let normed = self.norm(&format!("{layer}.attn_norm"), &x);
            let attn = format!("{layer}.attn");
            let mixed = match self.softmax_layer(i) {
                Some(spec) => self.softmax_attention(&attn, spec, &normed),
                None => self.attention(&attn, &normed),
            };
            x = add(&x, &mixed);
            let normed = self.norm(&format!("{layer}.mlp_norm"), &x);
            x = add(&x, &self.mlp(&format!("{layer}.mlp"), &normed));
        }
        let x = self.norm("model.norm", &x);
        if !self.flag("tie_word_embeddings") {
            return self.linear("lm_head", &x);
        }
        let logit = |x: &[f64], id: usize| dot(x, &embeddings[id * hidden..][..hidden]);
        x.iter().map(|x| (0..vocab).map(|id| logit(x, id)).collect()).collect()
    }
}

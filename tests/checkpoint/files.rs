//! Safetensors files as maps, to look into and to damage.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

pub const SINGLE: &str = "model.safetensors";

pub struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub type Entries = BTreeMap<String, Entry>;

impl Entry {
    /// The values, whatever the float type.
    pub fn values(&self) -> Vec<f64> {
        let halves = self.bytes.as_chunks::<2>().0.iter();
        match self.dtype {
            Dtype::F32 => {
                let words = self.bytes.as_chunks::<4>().0.iter();
                words.map(|b| f32::from_le_bytes(*b).into()).collect()
            }
            Dtype::F16 => halves.map(|b| half::f16::from_le_bytes(*b).into()).collect(),
            Dtype::BF16 => halves.map(|b| half::bf16::from_le_bytes(*b).into()).collect(),
            dtype => panic!("a weight in {dtype:?}"),
        }
    }

    /// Exchanges rows and columns, as a matrix of f32.
    pub fn transpose(&mut self) {
        let (rows, columns) = (self.shape[0], self.shape[1]);
        let words = self.bytes.as_chunks::<4>().0;
        let swapped = (0..rows * columns).map(|i| words[i % rows * columns + i / rows]);
        self.bytes = swapped.collect::<Vec<_>>().concat();
        self.shape = vec![columns, rows];
    }
}

pub fn read(path: &Path) -> Entries {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let entry = |(name, view): (String, TensorView)| {
        let (dtype, shape) = (view.dtype(), view.shape().to_vec());
        (name, Entry { dtype, shape, bytes: view.data().to_vec() })
    };
    tensors.into_iter().map(entry).collect()
}

/// The tensors of all safetensors files in `folder`.
pub fn read_all(folder: &Path) -> Entries {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.flat_map(|path| read(&path)).collect()
}

pub fn write(path: &Path, entries: &Entries) {
    let views = entries.iter().map(|(name, e)| {
        (name.clone(), TensorView::new(e.dtype, e.shape.clone(), &e.bytes).unwrap())
    });
    let views: HashMap<_, _> = views.collect();
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Changes the tensors of the one file in `folder`.
pub fn edit(folder: &Path, change: impl FnOnce(&mut Entries)) {
    let path = folder.join(SINGLE);
    let mut entries = read(&path);
    change(&mut entries);
    write(&path, &entries);
}

/// Changes `config.json` in `folder`.
pub fn edit_config(
    folder: &Path,
    change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>),
) {
    let path = folder.join("config.json");
    let mut config = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
}

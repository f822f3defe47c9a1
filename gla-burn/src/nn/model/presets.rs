//! The published models.

use super::GlaTransformerConfig;

/// Vocabulary of the published models.
const VOCABULARY: usize = 32000;

/// Configurations by name; parameters as counted by
/// [`num_params`](GlaTransformerConfig::num_params).
impl GlaTransformerConfig {
    /// Names that [`preset`](Self::preset) knows.
    pub const PRESETS: [&str; 3] = ["340M", "1.3B", "2.7B"];

    /// The published configuration of a name: `340M`, `1.3B` or `2.7B`, in either case.
    pub fn preset(name: &str) -> Option<Self> {
        match name.to_uppercase().as_str() {
            "340M" => Some(Self::gla_340m()),
            "1.3B" => Some(Self::gla_1_3b()),
            "2.7B" => Some(Self::gla_2_7b()),
            _ => None,
        }
    }

    /// GLA-340M, with tied embeddings: 341,707,776 parameters, 24 layers of width 1024.
    pub fn gla_340m() -> Self {
        Self::new(VOCABULARY, 1024, 24).with_tie_word_embeddings(true)
    }

    /// GLA-1.3B: 1,365,514,240 parameters, 24 layers of width 2048.
    pub fn gla_1_3b() -> Self {
        Self::new(VOCABULARY, 2048, 24)
    }

    /// GLA-2.7B: 2,703,583,744 parameters, 32 layers of width 2560 with 5 heads.
    pub fn gla_2_7b() -> Self {
        Self::new(VOCABULARY, 2560, 32).with_num_heads(5)
    }
}

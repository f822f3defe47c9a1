//! Many gates, one shape.

use super::Case;

/// Every strength of a gate on one shape, so that a software adapter, which takes seconds to compile
/// a kernel, compiles each once: `T` around two chunk boundaries and packed sequences, uneven
/// widths, grouped heads.
pub fn one_shape() -> Vec<Case> {
    let mut ids: Vec<String> = [
        "b2-t65-k33-v20-h4-kv2-init-final",
        "b2-t33-k33-v20-h4-kv2-init",
        "b2-t30-k33-v20-h4-kv2-final",
        "t1000-k33-v20-h4-kv2-final",
        "cu0.5.5.64.130-k33-v20-h4-kv2-init-final",
    ]
    .map(|rest| format!("none-{rest}"))
    .into();
    for gate in ["fixed", "scalar", "vector"] {
        for values in ["m0", "m0.03", "m0.7", "m7", "m50", "m1e4", "ls0.1", "ls1", "alt", "mixed"] {
            ids.push(format!("{gate}-{values}-b2-t65-k33-v20-h4-kv2-init-final"));
            ids.push(format!("{gate}-{values}-cu0.5.5.64.130-k33-v20-h4-kv2-init"));
        }
        ids.push(format!("{gate}-ls1-t130-k33-v20-h4-kv2-init-final"));
        ids.push(format!("{gate}-ls1-b2-t33-k33-v20-h4-kv2-init-final"));
        ids.push(format!("{gate}-mixed-t48-k33-v20-h4-kv2-init-final"));
        ids.push(format!("{gate}-ls1-b2-t30-k33-v20-h4-kv2-init-final"));
        ids.push(format!("{gate}-ls16-t1000-k33-v20-h4-kv2-init-final"));
    }
    ids.iter().map(|id| Case::parse(id).expect("an id of the catalogue")).collect()
}

//! What is to be computed ([`Problem`]), how it was chosen to run ([`Strategy`] to [`Blueprint`]),
//! and how rows fall into sequences and chunks ([`Sequences`]).

mod blueprint;
mod problem;
mod sequences;

pub use blueprint::*;
pub use problem::*;
pub use sequences::*;

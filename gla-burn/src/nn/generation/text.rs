use std::mem;

/// The text of a sequence that is being generated: bytes of tokens in, whole characters out, up to a
/// stop string.
///
/// A character that is spread over several tokens comes out with the last of its bytes. Bytes that
/// are no UTF-8 come out as U+FFFD, as [`String::from_utf8_lossy`] has it. Text that may yet turn
/// out to begin a stop string is held back, so a stop string that straddles tokens is found and no
/// part of it comes out. Of several stop strings the one that is complete first counts: what comes
/// out does not depend on where tokens end.
///
/// ```
/// # use gla_burn::TextStream;
/// let mut text = TextStream::new(["\n\n"]);
/// assert_eq!(text.push("caf".as_bytes()), "caf");
/// assert_eq!(text.push(&[0xc3]), "");
/// assert_eq!(text.push(&[0xa9, b'\n']), "é");
/// assert_eq!(text.push(b"\nmore"), "");
/// assert!(text.is_stopped());
/// ```
#[derive(Clone, Debug)]
pub struct TextStream {
    stop: Vec<String>,
    /// Bytes of a character that is not complete.
    bytes: Vec<u8>,
    /// Text that may begin a stop string.
    held: String,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends before the first of the stop strings; without any, it does not end. Empty
    /// strings stop nothing.
    pub fn new(stop: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let stop = stop.into_iter().map(Into::into).filter(|stop| !stop.is_empty()).collect();
        Self { stop, bytes: Vec::new(), held: String::new(), stopped: false }
    }

    /// Whether a stop string has come, or the stream was [finished](Self::finish). Nothing comes out after it.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Text that the bytes of a token complete; often empty.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.stopped {
            return String::new();
        }
        self.bytes.extend_from_slice(bytes);
        self.decode();
        match self.first_stop() {
            Some(start) => {
                self.stopped = true;
                self.held.truncate(start);
                mem::take(&mut self.held)
            }
            None => {
                let rest = self.held.split_off(self.held.len() - self.undecided());
                mem::replace(&mut self.held, rest)
            }
        }
    }

    /// The rest, when no more tokens will come: what was held back, and U+FFFD for a character that
    /// was never completed.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        let bytes = mem::take(&mut self.bytes);
        self.held.push_str(&String::from_utf8_lossy(&bytes));
        if let Some(start) = self.first_stop() {
            self.held.truncate(start);
        }
        self.stopped = true;
        mem::take(&mut self.held)
    }

    /// Moves whole characters from `bytes` to `held`.
    fn decode(&mut self) {
        let mut rest = self.bytes.as_slice();
        loop {
            match str::from_utf8(rest) {
                Ok(valid) => {
                    self.held.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    self.held.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    // no length: the last character may still be completed
                    let Some(bad) = error.error_len() else { break };
                    self.held.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[bad..];
                }
            }
        }
        self.bytes = rest.to_vec();
    }

    /// Where the stop string that is complete first begins; of two that end together, the longer.
    fn first_stop(&self) -> Option<usize> {
        let found = self.stop.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        found.min().map(|(_, start)| start)
    }

    /// Length of the longest end of `held` that begins a stop string.
    fn undecided(&self) -> usize {
        let held = self.held.as_bytes();
        let begins = |stop: &String| {
            let longest = held.len().min(stop.len() - 1);
            (1..=longest).rev().find(|&n| held.ends_with(&stop.as_bytes()[..n]))
        };
        // a stop string begins with the first byte of a character, and so does this end
        self.stop.iter().filter_map(begins).max().unwrap_or(0)
    }
}

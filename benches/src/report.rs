//! The files of a run: its rows, and what shows them.

use std::path::Path;

use anyhow::Result;

use crate::{Row, lines, markdown, roofline, svg, write_rows, write_text};

/// Writes the rows to a JSON file, and what [`draw`] makes of them.
///
/// # Errors
///
/// If a file cannot be written.
pub fn write(path: &Path, rows: &[Row]) -> Result<()> {
    write_rows(path, rows)?;
    draw(path, rows)
}

/// Writes what shows the rows of a JSON file beside it: NAME.md, NAME.svg, NAME-roofline.svg and, of rows that
/// sweep the length, NAME-lines.svg.
///
/// # Errors
///
/// If a file cannot be written.
pub fn draw(path: &Path, rows: &[Row]) -> Result<()> {
    let beside = |suffix: &str| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        path.with_file_name(format!("{stem}{suffix}"))
    };
    write_text(&beside(".md"), markdown(rows))?;
    write_text(&beside(".svg"), svg(rows))?;
    write_text(&beside("-roofline.svg"), roofline(rows))?;
    match lines(rows) {
        Some(chart) => write_text(&beside("-lines.svg"), chart),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read_rows;

    /// What a run writes is what its rows alone give.
    #[test]
    fn files_are_drawn_again() {
        let row = |shape: &str, ms| {
            let peer = Some("p".into());
            let (gate, pass, shape) = ("none".into(), "fwdbwd".into(), shape.parse().unwrap());
            let (peer_ms, roofline) = (ms, ms);
            Row { gate, pass, shape, ms, peer, peer_ms, roofline, ..Row::default() }
        };
        let failed = Row { error: Some("wrong".into()), ..row("8,128,1,4,4", None) };
        let rows = [
            row("4,256,1,4,4", Some(0.5)),
            row("2,512,1,4,4", Some(0.5)),
            row("1,1024,1,4,4", Some(0.5)),
            failed,
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.json");
        write(&path, &rows).unwrap();
        let names = ["rows.md", "rows.svg", "rows-roofline.svg", "rows-lines.svg"];
        let texts = || names.map(|name| std::fs::read_to_string(folder.path().join(name)).unwrap());
        let first = texts();
        for name in names {
            std::fs::remove_file(folder.path().join(name)).unwrap();
        }
        draw(&path, &read_rows(&path).unwrap()).unwrap();
        assert_eq!(texts(), first);
        assert!(first[0].contains("failed: wrong"));
        assert!(first[1..].iter().all(|chart| !chart.contains("8,128")));
    }
}

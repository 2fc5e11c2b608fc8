//! The common base of all HTML pages. Each page is one file and loads nothing from outside.
//!
//! A page's template extends `base.html`, the frame, and fills in its blocks: `title`, `heading`, `about` (what the page is of),
//! `verdict` (what a reader wants to know first), `content`, and where it needs them `style`, `data` and `script`. `parts.html`
//! has macros for charts and tables. The frame shows `figures`, pairs of a name and a value, and [`made`], if a page has them.

use minijinja::{AutoEscape, Environment, Value, context};
use serde::Serialize;

use crate::provenance::Provenance;

/// The frame.
const BASE: &str = include_str!("base.html");

/// Macros of several pages.
const PARTS: &str = include_str!("parts.html");

/// Colors for light and dark, text, tables and the charts of [`crate::plot`].
const STYLE: &str = include_str!("style.css");

/// The button with the id `theme`; a page that draws by script redraws on the event `theme`.
const THEME: &str = include_str!("theme.js");

/// Shows in the element `tip` what the pointer is over in the charts of [`crate::plot`], on pages without a script of their own.
const HOVER: &str = include_str!("hover.js");

/// What made the results that a page shows, in their order: pairs for `made` of the frame. Models, dates and machines are named
/// where they differ from those before.
pub fn made(made: &[Provenance]) -> Vec<(&'static str, String)> {
    let mut pairs: Vec<(&'static str, String)> = Vec::new();
    for made in made {
        let new = [
            ("Model", made.model.clone()),
            ("Date", made.when()),
            ("Machine", made.machine.clone()),
            ("Command", made.command.clone()),
        ];
        for (name, value) in new {
            let last = pairs.iter().rfind(|(known, _)| *known == name);
            if last.is_none_or(|(_, known)| *known != value) {
                pairs.push((name, value));
            }
        }
    }
    pairs
}

/// Fills in a page's template with `data`.
///
/// # Errors
/// If the template cannot be filled in, which would be a defect.
pub fn render(template: &str, data: impl Serialize) -> anyhow::Result<String> {
    let mut environment = Environment::new();
    // Whatever is not marked as safe in the template is text.
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.add_template("base.html", BASE)?;
    environment.add_template("parts.html", PARTS)?;
    let shared = context! {
        style => STYLE,
        theme => THEME,
        hover => HOVER,
        version => env!("CARGO_PKG_VERSION"),
    };
    Ok(environment.render_str(template, context! { ..Value::from_serialize(data), ..shared })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_scrolls_in_a_box_that_the_keyboard_reaches() {
        let template =
            r#"{% from "parts.html" import table %}{{ table("A & B", ["a"], [["1"]]) }}"#;
        let page = render(template, ()).unwrap();
        assert!(page.contains(r#"role="region" aria-label="A &amp; B" tabindex="0""#), "{page}");
        assert!(page.contains("<td>1</td>") && page.contains("</table></div>"), "{page}");
    }

    #[test]
    fn what_stays_the_same_is_said_once() {
        let first = Provenance {
            model: "base".into(),
            command: "still linearize".into(),
            date: "2026-11-29 20:21".into(),
            machine: "a CPU, 2 threads".into(),
            version: "1.0".into(),
        };
        let second = Provenance {
            command: "still linearize --resume".into(),
            date: "2026-11-30 08:00".into(),
            ..first.clone()
        };
        let made = made(&[first, second]);
        let names: Vec<&str> = made.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["Model", "Date", "Machine", "Command", "Date", "Command"]);
        assert_eq!(made[1].1, "2026-11-29 20:21 UTC, still 1.0");
        assert_eq!(made[5].1, "still linearize --resume");
    }
}

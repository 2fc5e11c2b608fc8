//! Numbers on the command line, with the ranges that their errors name.

/// Most tokens of a text, a prompt or a context.
pub const TOKENS: usize = 1 << 30;
/// Most steps, items, windows: things that are done one after the other.
pub const COUNT: usize = 1_000_000_000;
/// Most sequences that are read together.
pub const BATCH: usize = 65_536;
/// Most heads, and channels of a head.
pub const WIDTH: usize = 65_536;

/// A whole number from `least` to `most`.
pub fn whole(
    least: usize,
    most: usize,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| format!("it must be a whole number from {least} to {most}"))
    }
}

/// A seed: any number of 64 bits.
pub fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("it must be a whole number from 0 to {}", u64::MAX))
}

/// A number from `least` to `most`.
pub fn number(
    least: f64,
    most: f64,
) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    move |text| {
        // Neither holds of a NaN.
        let number = text.parse().ok().filter(|number| *number >= least && *number <= most);
        number.ok_or_else(|| format!("it must be a number from {least} to {most}"))
    }
}

/// A share, or a probability: above 0, at most 1.
pub fn share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| *number > 0.0 && *number <= 1.0);
    number.ok_or_else(|| "it must be a number above 0, at most 1".to_owned())
}

/// A number of bytes: `4GiB`, `500MB`, `1048576`.
pub fn bytes(text: &str) -> Result<usize, String> {
    const UNITS: [(&str, u64); 9] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    let unit = UNITS.iter().find(|(unit, _)| text.ends_with(unit));
    let (number, unit) = match unit {
        Some((name, unit)) => (text[..text.len() - name.len()].trim_end(), *unit),
        None => (text, 1),
    };
    let bytes = number.parse().ok().and_then(|number: f64| {
        let bytes = number * unit as f64;
        (number >= 0.0 && bytes <= (1_u64 << 53) as f64).then_some(bytes as usize)
    });
    bytes.ok_or_else(|| "it must be a number of bytes, such as 512MiB or 4GiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_units() {
        assert_eq!(bytes("4GiB"), Ok(4 << 30));
        assert_eq!(bytes("1.5 MiB"), Ok(3 << 19));
        assert_eq!((bytes("7"), bytes("7B"), bytes("2KB")), (Ok(7), Ok(7), Ok(2000)));
        for text in ["", "GiB", "-1GiB", "4 gib", "nan", "1e300TB"] {
            assert!(bytes(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn ranges_include_their_ends_and_nothing_else() {
        assert_eq!(whole(1, 8)("1"), Ok(1));
        assert_eq!(whole(1, 8)("8"), Ok(8));
        for text in ["0", "9", "-1", "1.5", "", "18446744073709551616"] {
            let told = whole(1, 8)(text).unwrap_err();
            assert_eq!(told, "it must be a whole number from 1 to 8", "{text:?}");
        }
        assert_eq!(number(0.0, 2.0)("2"), Ok(2.0));
        for text in ["-0.1", "2.1", "nan", "inf", "x"] {
            assert!(number(0.0, 2.0)(text).is_err(), "{text:?}");
        }
        assert_eq!(share("1"), Ok(1.0));
        assert!(share("0").is_err() && share("nan").is_err() && share("1.01").is_err());
        assert_eq!(seed("18446744073709551615"), Ok(u64::MAX));
        assert!(seed("-1").is_err());
    }
}

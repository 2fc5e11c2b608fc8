//! Values of the libraries' enums on the command line, by the names that they have there.

use std::error::Error;
use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

/// One of `all`, by its `name`, which the type itself reads. Help, completions and errors list the names.
pub fn one_of<T>(all: &'static [T], name: fn(T) -> &'static str) -> impl TypedValueParser<Value = T>
where
    T: Copy + FromStr<Err: Error + Send + Sync + 'static> + Send + Sync + 'static,
{
    PossibleValuesParser::new(all.iter().map(move |&value| PossibleValue::new(name(value))))
        .try_map(|name| name.parse::<T>())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use still_attention::RowDtype;
    use still_eval::operator::Pass;
    use still_model::GgufFormat;
    use still_train::Stage;

    use super::*;

    /// Every name is taken, and stands for its value; another is refused.
    fn check<T>(all: &'static [T], name: fn(T) -> &'static str)
    where
        T: Copy + PartialEq + std::fmt::Debug + Send + Sync + 'static,
        T: FromStr<Err: Error + Send + Sync + 'static>,
    {
        let command =
            clap::Command::new("x").arg(clap::Arg::new("v").value_parser(one_of(all, name)));
        for &value in all {
            let matches = command.clone().try_get_matches_from(["x", name(value)]).unwrap();
            assert_eq!(matches.get_one::<T>("v"), Some(&value));
        }
        let error = command.try_get_matches_from(["x", "no-such"]).unwrap_err().to_string();
        assert!(all.iter().all(|&value| error.contains(name(value))), "{error}");
    }

    #[test]
    fn every_value_has_a_name_that_stands_for_it() {
        check(&RowDtype::ALL, RowDtype::name);
        check(&Stage::ALL, Stage::name);
        check(&Pass::ALL, Pass::name);
        check(&GgufFormat::ALL, GgufFormat::name);
        check(&[DType::F32, DType::BF16], |dtype| dtype.as_str());
    }
}

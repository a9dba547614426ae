//! `primary_region`: where an app's machines go, and what they are told of it.

use crate::region::{MAX_TERMS, RegionExpr, RegionTerm};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

const RULE: &str = "name regions, the preferred one first, for example fra or fra,ams,eu: codes of 1 to 16 lower-case letters, digits and \
                    dashes, or apac, eu, na, sa, us, usa and any for all that are there";
/// Of a refused text in a message.
const MAX_TOLD: usize = 80;

/// Where an app's machines go. One word is a preference: where it has no room, any other region does. Several words are an
/// order, and all there is: `fra,ams,eu` never leaves Europe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PrimaryRegion {
    /// As it was written, without spaces: `us` and `usa` mean the same, and a region of an operator may have either name.
    text: Box<str>,
    regions: RegionExpr,
}

/// Names the key, what is wrong, and what may stand there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("primary_region: {why}")]
pub struct InvalidPrimaryRegion {
    /// Without the key.
    pub why: String,
}

impl PrimaryRegion {
    /// Where new machines may go, those of an app without a primary region included.
    pub fn places(primary: Option<&Self>) -> RegionExpr {
        match primary {
            None => RegionExpr::any(),
            Some(primary) => primary.order().cloned().unwrap_or_else(|| primary.regions.clone().or_any()),
        }
    }

    /// Those that are named.
    pub fn regions(&self) -> &RegionExpr {
        &self.regions
    }

    /// Several words: machines go nowhere else. `None`: one word, which is a preference only.
    pub fn order(&self) -> Option<&RegionExpr> {
        Some(&self.regions).filter(|regions| regions.terms().len() > 1)
    }

    /// What `PRIMARY_REGION` says to machines, one region as on Fly: the first that is named. Where there are only areas, the
    /// first of them; `None`: nothing is named, as without the key.
    pub fn named(&self) -> Option<&str> {
        match self.regions.first() {
            Some(region) => Some(region.as_str()),
            None => self.text.split(',').find(|word| *word != "any"),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for PrimaryRegion {
    type Err = InvalidPrimaryRegion;

    fn from_str(text: &str) -> Result<Self, InvalidPrimaryRegion> {
        let short = |text: &str| text.chars().take(MAX_TOLD).collect::<String>();
        let refused = |why: String| InvalidPrimaryRegion { why: format!("{:?} {why}; {RULE}", short(text)) };
        let words: Vec<&str> = text.split(',').take(MAX_TERMS + 1).map(str::trim).collect();
        if words.len() > MAX_TERMS {
            return Err(refused(format!("names more than {MAX_TERMS} regions")));
        }
        let mut terms: Vec<RegionTerm> = Vec::new();
        for word in &words {
            if word.is_empty() {
                let why = if words.len() == 1 { "names no region" } else { "has a comma with no region before or after it" };
                return Err(refused(why.into()));
            }
            let term = word.parse().map_err(|_| refused(format!("has {:?}, which cannot be a region", short(word))))?;
            if terms.contains(&term) {
                return Err(refused(format!("names {word} twice")));
            }
            terms.push(term);
        }
        Ok(Self { text: words.join(",").into(), regions: RegionExpr::of(terms) })
    }
}

impl TryFrom<String> for PrimaryRegion {
    type Error = InvalidPrimaryRegion;

    fn try_from(text: String) -> Result<Self, InvalidPrimaryRegion> {
        text.parse()
    }
}

impl From<PrimaryRegion> for String {
    fn from(primary: PrimaryRegion) -> Self {
        primary.text.into()
    }
}

impl fmt::Display for PrimaryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_is_a_preference_and_several_are_all_there_is() {
        let check = |text: &str, places: &str, named: Option<&str>| {
            let primary: PrimaryRegion = text.parse().unwrap();
            assert_eq!(PrimaryRegion::places(Some(&primary)).to_string(), places, "{text}");
            assert_eq!(primary.named(), named, "{text}");
            assert_eq!(serde_json::from_str::<PrimaryRegion>(&serde_json::to_string(&primary).unwrap()).unwrap(), primary);
        };
        check("fra", "fra,any", Some("fra"));
        check("attic-2", "attic-2,any", Some("attic-2"));
        check("eu", "eu,any", Some("eu"));
        check("usa", "us,any", Some("usa"));
        check("any", "any", None);
        check("fra,ams,eu", "fra,ams,eu", Some("fra"));
        check(" fra, ams ,any", "fra,ams,any", Some("fra"));
        check("eu,ams,fra", "eu,ams,fra", Some("ams"));
        check("any,eu", "any,eu", Some("eu"));
        assert_eq!(PrimaryRegion::places(None), RegionExpr::any());
        assert_eq!(" fra, usa".parse::<PrimaryRegion>().unwrap().as_str(), "fra,usa");
    }

    #[test]
    fn what_is_wrong_and_what_is_legal_is_said() {
        let long = (0..17).map(|n| format!("r{n}")).collect::<Vec<_>>().join(",");
        for (text, why) in [
            ("", "\"\" names no region"),
            ("fra,,ams", "\"fra,,ams\" has a comma with no region before or after it"),
            ("fra,", "\"fra,\" has a comma with no region"),
            ("fra ams", "\"fra ams\" has \"fra ams\", which cannot be a region"),
            ("fra,Ams", "\"fra,Ams\" has \"Ams\", which cannot be a region"),
            ("fra;ams", "which cannot be a region"),
            ("fra,averylongregionname", "has \"averylongregionname\", which cannot be a region"),
            ("fra,ams,fra", "\"fra,ams,fra\" names fra twice"),
            ("us,usa", "\"us,usa\" names usa twice"),
            (&long, "names more than 16 regions"),
            (&"x".repeat(100_000), "which cannot be a region"),
        ] {
            let said = text.parse::<PrimaryRegion>().unwrap_err().to_string();
            assert!(said.starts_with("primary_region: \"") && said.contains(why) && said.ends_with(RULE), "{said}");
            assert!(said.len() < 600, "{said}");
            let said = serde_json::from_value::<PrimaryRegion>(text.into()).unwrap_err().to_string();
            assert!(said.starts_with("primary_region: ") && said.contains(why), "{said}");
        }
        assert!((0..16).map(|n| format!("r{n}")).collect::<Vec<_>>().join(",").parse::<PrimaryRegion>().is_ok());
    }
}

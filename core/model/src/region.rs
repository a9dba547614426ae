//! Regions: where those of Fly are, the words for groups of them, and expressions that say which are preferred.
//!
//! A region is a code that an operator gives to hosts; any code will do. Codes of Fly's regions are known with the
//! place that they stand for, so that a word such as `eu` means something and the nearest other region can be named.

use crate::{InvalidName, Region};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Of one expression: what a person writes down as an order of preference.
pub(crate) const MAX_TERMS: usize = 16;
const EARTH_RADIUS_KM: f64 = 6371.0;

/// A region whose place is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    pub code: &'static str,
    /// City and country.
    pub name: &'static str,
    pub latitude: f64,
    pub longitude: f64,
    pub area: Area,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    Africa,
    AsiaPacific,
    Europe,
    UnitedStates,
    /// Of North America.
    Canada,
    Mexico,
    SouthAmerica,
}

/// Fly's codes, those included that it gives out no longer: files still name them. Codes and places are public; the
/// coordinates are those of the city.
pub const PLACES: &[Place] = &[
    place("ams", "Amsterdam, Netherlands", 52.37, 4.90, Area::Europe),
    place("arn", "Stockholm, Sweden", 59.33, 18.07, Area::Europe),
    place("atl", "Atlanta, Georgia (US)", 33.75, -84.39, Area::UnitedStates),
    place("bog", "Bogotá, Colombia", 4.71, -74.07, Area::SouthAmerica),
    place("bom", "Mumbai, India", 19.08, 72.88, Area::AsiaPacific),
    place("bos", "Boston, Massachusetts (US)", 42.36, -71.06, Area::UnitedStates),
    place("cdg", "Paris, France", 48.86, 2.35, Area::Europe),
    place("den", "Denver, Colorado (US)", 39.74, -104.99, Area::UnitedStates),
    place("dfw", "Dallas, Texas (US)", 32.78, -96.80, Area::UnitedStates),
    place("ewr", "Secaucus, New Jersey (US)", 40.79, -74.06, Area::UnitedStates),
    place("eze", "Ezeiza, Argentina", -34.85, -58.52, Area::SouthAmerica),
    place("fra", "Frankfurt, Germany", 50.11, 8.68, Area::Europe),
    place("gdl", "Guadalajara, Mexico", 20.67, -103.35, Area::Mexico),
    place("gig", "Rio de Janeiro, Brazil", -22.91, -43.17, Area::SouthAmerica),
    place("gru", "São Paulo, Brazil", -23.55, -46.63, Area::SouthAmerica),
    place("hkg", "Hong Kong", 22.32, 114.17, Area::AsiaPacific),
    place("iad", "Ashburn, Virginia (US)", 39.04, -77.49, Area::UnitedStates),
    place("jnb", "Johannesburg, South Africa", -26.20, 28.05, Area::Africa),
    place("lax", "Los Angeles, California (US)", 34.05, -118.24, Area::UnitedStates),
    place("lhr", "London, United Kingdom", 51.51, -0.13, Area::Europe),
    place("maa", "Chennai, India", 13.08, 80.27, Area::AsiaPacific),
    place("mad", "Madrid, Spain", 40.42, -3.70, Area::Europe),
    place("mia", "Miami, Florida (US)", 25.76, -80.19, Area::UnitedStates),
    place("nrt", "Tokyo, Japan", 35.68, 139.69, Area::AsiaPacific),
    place("ord", "Chicago, Illinois (US)", 41.88, -87.63, Area::UnitedStates),
    place("otp", "Bucharest, Romania", 44.43, 26.10, Area::Europe),
    place("phx", "Phoenix, Arizona (US)", 33.45, -112.07, Area::UnitedStates),
    place("qro", "Querétaro, Mexico", 20.59, -100.39, Area::Mexico),
    place("scl", "Santiago, Chile", -33.45, -70.67, Area::SouthAmerica),
    place("sea", "Seattle, Washington (US)", 47.61, -122.33, Area::UnitedStates),
    place("sin", "Singapore", 1.35, 103.82, Area::AsiaPacific),
    place("sjc", "San Jose, California (US)", 37.34, -121.89, Area::UnitedStates),
    place("syd", "Sydney, Australia", -33.87, 151.21, Area::AsiaPacific),
    place("waw", "Warsaw, Poland", 52.23, 21.01, Area::Europe),
    place("yul", "Montreal, Canada", 45.50, -73.57, Area::Canada),
    place("yyz", "Toronto, Canada", 43.65, -79.38, Area::Canada),
];

const fn place(code: &'static str, name: &'static str, latitude: f64, longitude: f64, area: Area) -> Place {
    Place { code, name, latitude, longitude, area }
}

/// The place that a region's code stands for, if it is one of Fly's.
pub fn place_of(region: &Region) -> Option<&'static Place> {
    let found = PLACES.binary_search_by(|place| place.code.cmp(region.as_str()));
    found.ok().map(|index| &PLACES[index])
}

/// Along the surface, in whole kilometres; `None` if a place is not known. A region is 0 km from itself.
pub fn distance_km(from: &Region, to: &Region) -> Option<u32> {
    if from == to {
        return Some(0);
    }
    let (from, to) = (place_of(from)?, place_of(to)?);
    let (lat, other_lat) = (from.latitude.to_radians(), to.latitude.to_radians());
    let half = |a: f64, b: f64| ((b - a) / 2.0).sin().powi(2);
    let chord = half(lat, other_lat)
        + lat.cos() * other_lat.cos() * half(from.longitude.to_radians(), to.longitude.to_radians());
    Some((2.0 * EARTH_RADIUS_KM * chord.sqrt().min(1.0).asin()).round() as u32)
}

/// Regions in the order in which they are preferred: `fra,ams,eu`. Earlier terms first, those after the first are tried
/// when there is no room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RegionExpr(Vec<RegionTerm>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegionTerm {
    Any,
    /// All regions of Fly in an area, and a region that is called like the word itself.
    Group(Group),
    Code(Region),
}

/// The words of Fly's region expressions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    AsiaPacific,
    Europe,
    NorthAmerica,
    SouthAmerica,
    UnitedStates,
}

impl Group {
    fn named(word: &str) -> Option<Self> {
        Some(match word {
            "apac" => Self::AsiaPacific,
            "eu" => Self::Europe,
            "na" => Self::NorthAmerica,
            "sa" => Self::SouthAmerica,
            "us" | "usa" => Self::UnitedStates,
            _ => return None,
        })
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::AsiaPacific => "apac",
            Self::Europe => "eu",
            Self::NorthAmerica => "na",
            Self::SouthAmerica => "sa",
            Self::UnitedStates => "us",
        }
    }

    fn has(self, area: Area) -> bool {
        match self {
            Self::AsiaPacific => area == Area::AsiaPacific,
            Self::Europe => area == Area::Europe,
            Self::NorthAmerica => matches!(area, Area::UnitedStates | Area::Canada | Area::Mexico),
            Self::SouthAmerica => area == Area::SouthAmerica,
            Self::UnitedStates => area == Area::UnitedStates,
        }
    }
}

impl RegionTerm {
    fn has(&self, region: &Region) -> bool {
        match self {
            Self::Any => true,
            Self::Group(group) => {
                Group::named(region.as_str()) == Some(*group) || place_of(region).is_some_and(|place| group.has(place.area))
            }
            Self::Code(code) => code == region,
        }
    }
}

impl RegionExpr {
    pub fn any() -> Self {
        Self(vec![RegionTerm::Any])
    }

    pub fn only(region: Region) -> Self {
        Self(vec![RegionTerm::Code(region)])
    }

    pub(crate) fn of(terms: Vec<RegionTerm>) -> Self {
        Self(terms)
    }

    /// Any other, too, when those have no room.
    pub fn or_any(mut self) -> Self {
        if !self.0.contains(&RegionTerm::Any) {
            self.0.push(RegionTerm::Any);
        }
        self
    }

    /// How far down the order a region is, 0 first; `None`: it is not wanted.
    pub fn rank(&self, region: &Region) -> Option<usize> {
        self.0.iter().position(|term| term.has(region))
    }

    /// The region that is named first: others are near to it or far from it.
    pub fn first(&self) -> Option<&Region> {
        self.0.iter().find_map(|term| match term {
            RegionTerm::Code(region) => Some(region),
            RegionTerm::Any | RegionTerm::Group(_) => None,
        })
    }

    pub fn terms(&self) -> &[RegionTerm] {
        &self.0
    }
}

impl FromStr for RegionTerm {
    type Err = InvalidName;

    fn from_str(word: &str) -> Result<Self, InvalidName> {
        match (word, Group::named(word)) {
            ("any", _) => Ok(Self::Any),
            (_, Some(group)) => Ok(Self::Group(group)),
            (code, None) => code.parse().map(Self::Code),
        }
    }
}

impl fmt::Display for RegionTerm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::Group(group) => group.as_str(),
            Self::Code(region) => region.as_str(),
        })
    }
}

impl FromStr for RegionExpr {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let invalid = |rule| InvalidName { kind: "region", value: text.chars().take(80).collect(), rule };
        let term = |word: &str| word.trim().parse().map_err(|error: InvalidName| invalid(error.rule));
        let terms = text.split(',').take(MAX_TERMS + 1).map(term).collect::<Result<Vec<_>, _>>()?;
        if terms.len() > MAX_TERMS {
            return Err(invalid("name at most 16 regions, the preferred one first"));
        }
        Ok(Self(terms))
    }
}

impl TryFrom<String> for RegionExpr {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<RegionExpr> for String {
    fn from(expr: RegionExpr) -> Self {
        expr.to_string()
    }
}

impl fmt::Display for RegionExpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, term) in self.0.iter().enumerate() {
            if nth > 0 {
                f.write_str(",")?;
            }
            write!(f, "{term}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(code: &str) -> Region {
        code.parse().unwrap()
    }

    #[test]
    fn places_are_in_order_and_on_earth() {
        assert!(PLACES.windows(2).all(|pair| pair[0].code < pair[1].code), "they are searched by halving");
        for place in PLACES {
            assert_eq!(place_of(&region(place.code)).map(|found| found.name), Some(place.name));
            assert!(place.latitude.abs() <= 90.0 && place.longitude.abs() <= 180.0, "{}", place.code);
        }
    }

    #[test]
    fn distances_are_those_of_an_atlas() {
        for (from, to, km) in [("fra", "ams", 364), ("lhr", "cdg", 344), ("nrt", "syd", 7820), ("iad", "lhr", 5910), ("sea", "nrt", 7700)] {
            let found = distance_km(&region(from), &region(to)).unwrap();
            assert!(found.abs_diff(km) * 50 <= km, "{from} to {to}: {found} km, an atlas says {km}");
            assert_eq!(Some(found), distance_km(&region(to), &region(from)));
        }
        assert_eq!(distance_km(&region("attic"), &region("attic")), Some(0));
        assert_eq!(distance_km(&region("attic"), &region("fra")), None);
    }

    #[test]
    fn expressions_are_an_order_of_preference() {
        let check = |text: &str, code: &str, rank: Option<usize>| {
            let expr: RegionExpr = text.parse().unwrap();
            assert_eq!(expr.rank(&region(code)), rank, "{code} in {text}");
            assert_eq!(expr.to_string().parse::<RegionExpr>().unwrap(), expr);
        };
        check("fra,ams,eu", "fra", Some(0));
        check("fra, ams ,eu", "ams", Some(1));
        check("fra,ams,eu", "waw", Some(2));
        check("fra,ams,eu", "iad", None);
        check("na,any", "yyz", Some(0));
        check("us", "yyz", None);
        check("usa", "iad", Some(0));
        check("sa", "gru", Some(0));
        check("apac", "syd", Some(0));
        check("any", "attic", Some(0));
        check("eu", "eu", Some(0));
        check("eu", "attic", None);
        check("attic", "attic", Some(0));
        for wrong in ["", "fra,", "Frankfurt", "a b", &"fra,".repeat(17)] {
            assert!(wrong.parse::<RegionExpr>().is_err(), "{wrong:?}");
        }
        let first = |text: &str| text.parse::<RegionExpr>().unwrap().first().cloned();
        assert_eq!((first("eu,fra,ams"), first("eu,any")), (Some(region("fra")), None));
        assert_eq!(RegionExpr::only(region("fra")).or_any().to_string(), "fra,any");
        assert_eq!(RegionExpr::any().or_any(), RegionExpr::any());
    }
}

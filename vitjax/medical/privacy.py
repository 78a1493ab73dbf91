"""A lint for what names a person: tags of DICOM, EXIF, columns of tables.

It is no de-identifier: it finds what is filled in, not what is drawn into pixels, and it cannot
know whether an identifier is a real one.
"""

import csv
import dataclasses
import gzip
import hashlib
import io
import os
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vitjax.data import dicom
from vitjax.errors import InputError, UnreadableImage
from vitjax.medical.cohort import Cohort

TAGS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientBirthTime", "PatientBirthName",
    "PatientAddress", "PatientTelephoneNumbers", "PatientMotherBirthName", "OtherPatientIDs",
    "OtherPatientIDsSequence", "OtherPatientNames", "MilitaryRank", "ResponsiblePerson",
    "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName",
    "ReferringPhysicianName", "ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers",
    "PerformingPhysicianName", "RequestingPhysician", "PhysiciansOfRecord",
    "NameOfPhysiciansReadingStudy", "OperatorsName", "AccessionNumber", "PatientComments",
)  # fmt: skip
FREE_TEXT = ("ImageComments", "StudyComments", "AdditionalPatientHistory", "TextValue")
ULTRASOUND, CAPTURE = "1.2.840.10008.5.1.4.1.1.6", "1.2.840.10008.5.1.4.1.1.7"
NAMING = re.compile(
    r"(?:^|[^a-z])(?:name|surname|mrn|dob|birth|ssn|address|phone|email|e_mail)(?:s|$|[^a-z])"
    r"|birth_?date|date_?of_?birth|(?:first|last|patient|full)_?name|medical_?record"
)
HARMLESS = re.compile(r"(?:file|image|class|label|finding|dataset|column|study|series)s?_?names?$")
EMAIL = re.compile(r"[^@\s|/]+@[^@\s|/]+\.[a-z]{2,}", re.I)
SSN = re.compile(r"\b\d{3}-\d{2}-\d{4}\b")
GPS, OWNERS = 0x8825, {0x010E: "ImageDescription", 0x013B: "Artist", 0x9286: "UserComment"}
MAX_FILES, MAX_ROWS = 1000, 1000
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that may name a person.

    Attributes:
      name: by which it can be allowed, such as "PatientName" or "column email".
      text: what is found; never the value.
      is_problem: else it is a warning.
    """

    name: str
    text: str
    is_problem: bool = True


@dataclasses.dataclass(frozen=True)
class Findings:
    """Of many files: a sentence each, and how many files were looked at."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    looked_at: int = 0
    total: int = 0


def hashed(identifier: str, salt: str) -> str:
    """Twelve letters that stand for an identifier in logs; the salt keeps it from being guessed."""
    key = hashlib.sha256(salt.encode()).digest()[:16]
    return hashlib.blake2b(identifier.encode(), digest_size=6, key=key).hexdigest()


def check_dicom(dataset: Any) -> list[Finding]:
    """What is filled in that names a person, a doctor or a place, and what may be in the pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [Finding(tag, f"{tag} is filled in") for tag in TAGS if _filled(dataset, tag)]
        found += [
            Finding(tag, f"{tag} is filled in: free text may name a person")
            for tag in FREE_TEXT
            if _filled(dataset, tag)
        ]
        removed = str(dataset.get("PatientIdentityRemoved") or "").strip().upper() == "YES"
        if not removed and any(element.tag.is_private for element in dataset):
            found.append(
                Finding(
                    "private tags",
                    "private tags are there, and PatientIdentityRemoved does not say YES",
                )
            )
        burned = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
        kind = str(dataset.get("SOPClassUID") or "")
    name = "BurnedInAnnotation"
    if burned == "YES":
        found.append(Finding(name, f"{name} says YES: the pixels hold text"))
    elif burned != "NO" and kind.startswith((ULTRASOUND, CAPTURE)):
        found.append(
            Finding(name, f"{name} is not told, of a kind whose pixels often hold text", False)
        )
    return found


def _filled(dataset: Any, tag: str) -> bool:
    value = dataset.get(tag)
    return value is not None and bool(str(value).strip(" ^[]<>"))


def check_exif(image: bytes) -> list[Finding]:
    """Where a picture was taken, by whom, and what somebody wrote into it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(image)) as opened:
                exif = opened.getexif()
                place, inner = exif.get_ifd(GPS), exif.get_ifd(0x8769)
        except Exception:  # what is no image is told where it is decoded
            return []
    found = [Finding("GPS", "EXIF tells the place (GPS)")] if place else []
    for tag, name in OWNERS.items():
        value = exif.get(tag) or inner.get(tag)
        text = value.decode("latin-1") if isinstance(value, bytes) else str(value or "")
        if text.replace("ASCII", "").strip("\0 "):
            found.append(Finding(name, f"EXIF's {name} is filled in", False))
    return found


def check_columns(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Finding]:
    """Columns whose names, or whose cells, are those of persons; and columns of free text.

    Args:
      rows: some of the table's.
    """
    found = {}
    for name in names:
        lowered = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace(" ", "_")
        if NAMING.search(lowered) and not HARMLESS.search(lowered):
            found[name] = f"the column {name!r} is named like an identifier"
    for name, cells in zip(names, zip(*rows, strict=False), strict=False):
        texts = [str(cell) for cell in cells if str(cell).strip()]
        if not texts or name in found:
            continue
        if any(EMAIL.search(text) for text in texts):
            found[name] = f"the column {name!r} holds addresses of e-mail"
        elif any(SSN.search(text) for text in texts):
            found[name] = f"the column {name!r} holds numbers like those of social security"
        elif _is_free(texts):
            found[name] = f"the column {name!r} holds free text, which may name a person"
    return [Finding(f"column {name}", text) for name, text in found.items()]


def _is_free(texts: list[str]) -> bool:
    """Sentences, most of them different: not the few phrases of a code."""
    long = [text for text in texts if len(text.split()) >= 6]
    return len(long) * 10 >= len(texts) and len(set(long)) * 2 > len(long) and len(set(long)) > 1


def lint(what: Cohort | Sequence[str], allow: Collection[str] = ()) -> Findings:
    """Looks at headers and tables of a cohort, or of files: a thousand, evenly spread.

    Args:
      what: a cohort, or paths of DICOM files, images and CSV tables.
      allow: names of findings that are known and accepted, such as "PatientID", which may be a
        pseudonym: that cannot be seen.

    Raises:
      InputError: `allow` names what is no finding of any kind.
    """
    unknown = [x for x in allow if not _is_finding(x)]
    if unknown:
        known = ", ".join((*TAGS, *FREE_TEXT, "private tags", "BurnedInAnnotation", "GPS"))
        raise InputError(f"allow names {unknown[0]!r}; allowed: {known}, 'column NAME'")
    counts: dict[Finding, int] = {}
    first: dict[Finding, str] = {}
    is_cohort = isinstance(what, Cohort)
    paths = _paths_of(what) if is_cohort else list(what)
    total = len(what.images) if is_cohort and not paths else len(paths)
    places = (
        np.unique(np.linspace(0, total - 1, min(total, MAX_FILES)).astype(int)) if total else []
    )
    for place in places:
        if paths:
            where, findings = paths[place], _of_file(paths[place])
        else:
            assert isinstance(what, Cohort)
            where, findings = str(what.ids[place]), _of_image(what, int(place))
        for finding in findings:
            counts[finding] = counts.get(finding, 0) + 1
            first.setdefault(finding, where)
    if isinstance(what, Cohort):
        columns = what.columns
        picked = [[str(x) for x in values[:MAX_ROWS]] for values in columns.values()]
        of_columns = check_columns(list(columns), zip(*picked, strict=True))
        for path in what.files:
            of_columns += _of_table(path) if path.lower().endswith(TABLES) else []
        for finding in of_columns:
            counts[finding], first[finding] = 1, what.name
    texts: dict[bool, list[str]] = {True: [], False: []}
    for finding, count in counts.items():
        if finding.name not in allow:
            many = f"{count} of {len(places)} files, the first " if count > 1 else ""
            texts[finding.is_problem].append(
                f"{finding.name}: {finding.text} ({many}{first[finding]})"
            )
    return Findings(tuple(texts[True]), tuple(texts[False]), len(places), total)


def require_private(what: Cohort | Sequence[str], allow: Collection[str] = ()) -> Findings:
    """`lint`, which stops a run where there is a problem.

    Raises:
      InputError: there is one; it tells how to allow it.
    """
    findings = lint(what, allow)
    if findings.problems:
        listed = "".join(f"\n  {problem}" for problem in findings.problems[:20])
        more = len(findings.problems) - 20
        raise InputError(
            f"the data seem to name persons ({findings.looked_at} of {findings.total} files looked "
            f"at):{listed}{f'{chr(10)}  ... and {more} more' if more > 0 else ''}\n"
            "This is a lint, not a de-identifier: remove what is named here and look for the rest "
            "yourself. What is known to be harmless, such as pseudonyms in PatientID, is allowed "
            'by its name: allow=["PatientID"].'
        )
    return findings


def _is_finding(name: str) -> bool:
    others = ("private tags", "BurnedInAnnotation", "GPS", *OWNERS.values())
    return name in TAGS or name in FREE_TEXT or name in others or name.startswith("column ")


def _paths_of(cohort: Cohort) -> list[str]:
    paths = getattr(cohort.images, "paths", None)
    return list(paths) if paths is not None and len(paths) == len(cohort) else []


def _of_file(path: str) -> list[Finding]:
    if path.lower().endswith(TABLES):
        return _of_table(path)
    try:
        with open(path, "rb") as file:
            start = file.read(132)
            if not dicom.is_dicom(start):
                return check_exif(start + file.read())
        return check_dicom(dicom.header(path))
    except (OSError, UnreadableImage):
        return []  # told where it is decoded


def _of_image(cohort: Cohort, row: int) -> list[Finding]:
    try:
        image = cohort.images[row]
        if not isinstance(image, bytes):
            return []
        return check_dicom(dicom.header(image)) if dicom.is_dicom(image) else check_exif(image)
    except UnreadableImage:
        return []


def _of_table(path: str) -> list[Finding]:
    """The header and the first rows."""
    opener = gzip.open if path.endswith(".gz") else open
    delimiter = "\t" if ".tsv" in os.path.basename(path).lower() else ","
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            names = next(reader, [])
            rows = [row for _, row in zip(range(MAX_ROWS), reader, strict=False)]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []  # told where it is read
    return check_columns(names, [row for row in rows if len(row) == len(names)])

"""Which values of a source header may travel into an object that leaves the house?

UIDs, valid dates and times of the study, and terms of the standard; nothing else. Free text (names,
ids, descriptions, institutions) is copied only when the user asked for it with `identified`.
"""

from __future__ import annotations

import re
from datetime import date, time

from pydicom.dataset import Dataset
from pydicom.valuerep import DA, TM, DSfloat

from med_gradcam.formats._dicom_headers import DAMAGE, numbers, term

# BodyPartExamined (PS3.16 Annex L) -> SNOMED CT code and meaning for Frame Anatomy.
_BODY_PARTS = {
    "ABDOMEN": ("818981001", "Abdomen"),
    "ABDOMENPELVIS": ("818982008", "Abdomen and Pelvis"),
    "BRAIN": ("12738006", "Brain"),
    "BREAST": ("76752008", "Breast"),
    "CHEST": ("816094009", "Chest"),
    "CHESTABDOMEN": ("416550000", "Chest and Abdomen"),
    "CHESTABDPELVIS": ("416775004", "Chest, Abdomen and Pelvis"),
    "CSPINE": ("122494005", "Cervical spine"),
    "HEAD": ("69536005", "Head"),
    "HEADNECK": ("774007", "Head and Neck"),
    "HEART": ("80891009", "Heart"),
    "HIP": ("24136001", "Hip joint"),
    "KIDNEY": ("64033007", "Kidney"),
    "KNEE": ("72696002", "Knee"),
    "LIVER": ("10200004", "Liver"),
    "LSPINE": ("122496007", "Lumbar spine"),
    "LUNG": ("39607008", "Lung"),
    "NECK": ("45048000", "Neck"),
    "NECKCHEST": ("417437006", "Neck and Chest"),
    "PANCREAS": ("15776009", "Pancreas"),
    "PELVIS": ("816092008", "Pelvis"),
    "PROSTATE": ("41216001", "Prostate"),
    "SHOULDER": ("16982005", "Shoulder"),
    "SKULL": ("89546000", "Skull"),
    "SPINE": ("421060004", "Spine"),
    "SPLEEN": ("78961009", "Spleen"),
    "TSPINE": ("122495006", "Thoracic spine"),
    "UTERUS": ("35039007", "Uterus"),
    "WHOLEBODY": ("38266002", "Entire body"),
}
_ANYWHERE = ("123037004", "Body structure")
_POSITIONS = ("HFP", "HFS", "HFDR", "HFDL", "FFDR", "FFDL", "FFP", "FFS")
_LOSSY_METHODS = ("ISO_10918_1", "ISO_14495_1", "ISO_15444_1", "ISO_15444_15", "ISO_13818_2")
# Type 2 attributes of Patient and General Study: always there, empty unless identified.
_PERSONAL = (
    "PatientName",
    "PatientID",
    "PatientSex",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)
_PERSONAL_OPTIONAL = ("IssuerOfPatientID", "PatientAge", "StudyDescription")
_METHOD = "UIDs, study date and time and coded terms of the source kept"


def tidy(text: str, most: int) -> str:
    """`text` on one line, without control characters or backslashes, at most `most` UTF-8 bytes."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    clean = clean.replace("\\", "/")
    if len(clean.encode()) <= most:
        return clean
    return clean.encode()[: most - 3].decode(errors="ignore").rstrip() + "..."


def study_date(data: Dataset, keyword: str) -> str:
    """A DICOM date of the header, "" unless it is a valid one."""
    found = str(data.get(keyword) or "")
    try:
        return found if re.fullmatch(r"\d{8}", found) and isinstance(DA(found), date) else ""
    except DAMAGE:
        return ""


def study_time(data: Dataset, keyword: str) -> str:
    """A DICOM time of the header, "" unless it is a valid one."""
    found = str(data.get(keyword) or "").strip()
    try:
        valid = re.fullmatch(r"\d{2,6}(\.\d{1,6})?", found) and isinstance(TM(found), time)
    except DAMAGE:
        return ""
    return found if valid else ""


def offset(data: Dataset) -> str:
    """The source's TimezoneOffsetFromUTC, "+0100"; "" when there is none."""
    found = str(data.get("TimezoneOffsetFromUTC") or "").strip()
    return found if re.fullmatch(r"[+-](0\d|1[0-4])[0-5]\d", found) else ""


def anatomy(data: Dataset) -> tuple[str, str, str]:
    """(BodyPartExamined or "", SNOMED CT code, meaning) of the source."""
    part = term(data, "BodyPartExamined")
    code, meaning = _BODY_PARTS.get(part, _ANYWHERE)
    return part if part in _BODY_PARTS else "", code, meaning


def side(data: Dataset) -> str:
    """The source's Laterality, R or L; "" when there is none."""
    found = term(data, "Laterality")
    return found if found in ("R", "L") else ""


def copy_patient_and_study(data: Dataset, into: Dataset, *, identified: bool) -> None:
    """Fill the Patient and General Study modules of `into`: empty unless `identified`."""
    for keyword in _PERSONAL:
        setattr(into, keyword, str(data.get(keyword) or "") if identified else "")
    into.PatientBirthDate = study_date(data, "PatientBirthDate") if identified else ""
    into.StudyDate = study_date(data, "StudyDate")
    into.StudyTime = study_time(data, "StudyTime")
    zone = offset(data)
    if zone:
        into.TimezoneOffsetFromUTC = zone
    if not identified:
        into.PatientIdentityRemoved = "YES"
        into.DeidentificationMethod = _METHOD
        return
    for keyword in _PERSONAL_OPTIONAL:
        if data.get(keyword):
            setattr(into, keyword, str(data[keyword].value))
    removed = term(data, "PatientIdentityRemoved")
    if removed in ("YES", "NO"):
        into.PatientIdentityRemoved = removed
    if removed == "YES":
        into.DeidentificationMethod = tidy(str(data.get("DeidentificationMethod") or _METHOD), 64)


def copy_terms(data: Dataset, into: Dataset) -> None:
    """Copy the coded terms that viewers need: body part, patient position, lossy history.

    The side goes into FrameLaterality, which forbids a Laterality beside it.
    """
    part = anatomy(data)[0]
    if part:
        into.BodyPartExamined = part
    position = term(data, "PatientPosition")
    if position in _POSITIONS:
        into.PatientPosition = position
    modified = term(data, "LongitudinalTemporalInformationModified")
    if modified in ("UNMODIFIED", "MODIFIED", "REMOVED"):
        into.LongitudinalTemporalInformationModified = modified
    _copy_lossy_history(data, into)


def _copy_lossy_history(data: Dataset, into: Dataset) -> None:
    """Once lossy, always lossy: the flag, and the ratio and method where they are valid."""
    lossy = term(data, "LossyImageCompression") == "01"
    into.LossyImageCompression = "01" if lossy else "00"
    if not lossy:
        return
    ratio = numbers(data, "LossyImageCompressionRatio")
    if ratio:
        into.LossyImageCompressionRatio = [DSfloat(r, auto_format=True) for r in ratio]
    method = term(data, "LossyImageCompressionMethod")
    if method in _LOSSY_METHODS:
        into.LossyImageCompressionMethod = method

"""``aslseg import``: scans and labels as other people keep them, brought into a studies folder.

:mod:`~aslseg.cases.importing.layouts` has one class for each layout, which pairs scans with labels by their names.
:mod:`~aslseg.cases.importing.plan` decides what each voxel value means and lists every question that is open;
:mod:`~aslseg.cases.importing.transfer` writes, one case at a time, and never over a label that is there.
"""

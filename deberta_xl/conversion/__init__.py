"""From one world's folder to another's: conversion, edits, export, model cards, and the proof that nothing was lost."""

"""Adapters: small weights beside a frozen UNet, made, kept in files, proved, merged."""

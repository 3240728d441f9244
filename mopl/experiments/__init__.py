"""What every experiment is made of, whatever it trains: settings, run directories, stages, the methods of COS-DPO."""

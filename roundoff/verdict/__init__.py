"""Do two modes train alike?"""
